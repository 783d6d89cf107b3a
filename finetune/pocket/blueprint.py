"""The parts of the pocket model before training: tokenizer, processor and a random FastVLM of about 3 M parameters.

The tower is a small ConvNeXt: it has no batch norm, its pointwise convolutions are linear modules that LoRA can adapt,
and at this size it learns shapes from several times fewer images than a vision transformer.
"""

from collections.abc import Iterable

from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    ConvNextConfig,
    FastVlmConfig,
    FastVlmForConditionalGeneration,
    LlavaProcessor,
    PreTrainedTokenizerFast,
    Qwen2Config,
    ViTImageProcessor,
)

from finetune.pocket.drawing import SIDE

STRIDE = 16  # pixels a side that become one image token
IMAGE_TOKENS = (SIDE // STRIDE) ** 2
CHANNELS = (40, 80, 160)  # of the tower's three stages
VOCABULARY = 1200

PAD, END, IMAGE = "<pad>", "<|end|>", "<image>"
ROLES = ("system", "user", "assistant")
_SPECIAL = [PAD, END, IMAGE, *(f"<|{role}|>" for role in ROLES)]

CHAT_TEMPLATE = (
    "{% for message in messages %}<|{{ message['role'] }}|>"
    "{% if message['role'] == 'assistant' %} {% endif %}"
    "{% if message['content'] is string %}{{ message['content'] }}"
    "{% else %}{% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}<image>{% else %}{{ part['text'] }}{% endif %}"
    "{% endfor %}{% endif %}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


def build_tokenizer(texts: Iterable[str]) -> PreTrainedTokenizerFast:
    """Train a byte-level BPE on ``texts``: all 256 bytes are tokens, so any text encodes; each digit is one token."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(r"\d| ?\p{L}+| ?[^\s\p{L}\d]+|\s+"), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=_SPECIAL,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token=PAD, eos_token=END, padding_side="right", model_max_length=512
    )


def build_processor(tokenizer: PreTrainedTokenizerFast) -> LlavaProcessor:
    """Return the processor: images are squashed to 64 x 64 and scaled to -1..1, never tiled."""
    images = ViTImageProcessor(
        size={"height": SIDE, "width": SIDE}, image_mean=[0.5] * 3, image_std=[0.5] * 3, do_convert_rgb=True
    )
    return LlavaProcessor(
        images,
        tokenizer,
        patch_size=STRIDE,
        vision_feature_select_strategy="full",
        image_token=IMAGE,
        chat_template=CHAT_TEMPLATE,
    )


def build_model(tokenizer: PreTrainedTokenizerFast) -> FastVlmForConditionalGeneration:
    """Return the model with random weights, in fp32; seed torch before."""
    pad, end, image = (tokenizer.get_vocab()[token] for token in (PAD, END, IMAGE))
    vision = ConvNextConfig(
        patch_size=4,
        num_stages=3,
        hidden_sizes=list(CHANNELS),
        depths=[2, 2, 4],
        image_size=SIDE,
        layer_scale_init_value=0.1,
    )
    vision.hidden_size = CHANNELS[-1]  # width of the projector's input
    text = Qwen2Config(
        vocab_size=len(tokenizer),
        hidden_size=192,
        intermediate_size=512,
        num_hidden_layers=4,
        num_attention_heads=6,
        num_key_value_heads=6,
        max_position_embeddings=512,
        tie_word_embeddings=True,
        pad_token_id=pad,
        eos_token_id=end,
        bos_token_id=None,
    )
    config = FastVlmConfig(
        vision_config=vision,
        text_config=text,
        image_token_index=image,
        image_seq_length=IMAGE_TOKENS,
        tie_word_embeddings=True,
    )
    config.pad_token_id, config.eos_token_id = pad, end
    model = FastVlmForConditionalGeneration(config).float()
    model.generation_config.eos_token_id = end
    model.generation_config.pad_token_id = pad
    return model
