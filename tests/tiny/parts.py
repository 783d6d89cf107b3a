"""What the tiny models are made of: a tokenizer, small towers, a way to save them as the hub lays them out."""

from pathlib import Path

import torch
from tokenizers import pre_tokenizers
from transformers import CLIPTokenizer, PreTrainedTokenizerFast

from finetune.pocket.blueprint import build_tokenizer

SIDE = 32  # pixels
_TEXTS = ["What color is it? red", "Is it a circle? yes no", "How many? one two three", "blue green left right"]

# As the pocket model's, with the image's own mark to be put in.
TEMPLATE = (
    "{% for message in messages %}<|{{ message['role'] }}|>"
    "{% if message['role'] == 'assistant' %} {% endif %}"
    "{% if message['content'] is string %}{{ message['content'] }}"
    "{% else %}{% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}IMAGE{% else %}{{ part['text'] }}{% endif %}"
    "{% endfor %}{% endif %}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


def template(image: str) -> str:
    """A chat template in which an image is ``image``."""
    return TEMPLATE.replace("IMAGE", image)


def tokenizer(*extra: str, **named: str) -> PreTrainedTokenizerFast:
    """A byte-level tokenizer with more special tokens; ``named`` ones become attributes, as ``image_token`` does."""
    base = build_tokenizer(_TEXTS)
    base.add_tokens([*extra, *named.values()], special_tokens=True)
    if not named:
        return base
    return PreTrainedTokenizerFast(
        tokenizer_object=base.backend_tokenizer,
        pad_token=base.pad_token,
        eos_token=base.eos_token,
        padding_side="right",
        model_max_length=512,
        extra_special_tokens=named,
    )


def clip_tokenizer() -> CLIPTokenizer:
    """CLIP's tokenizer without merges: each byte is a token, and one more where it ends a word."""
    symbols = sorted(pre_tokenizers.ByteLevel.alphabet())
    words = [*symbols, *(f"{symbol}</w>" for symbol in symbols), "<|startoftext|>", "<|endoftext|>"]
    return CLIPTokenizer({word: number for number, word in enumerate(words)}, [])


def text(tokens: PreTrainedTokenizerFast, **more: object) -> dict:
    """The sizes of a two-layer decoder for this tokenizer."""
    return {
        "vocab_size": len(tokens),
        "hidden_size": 64,  # bitsandbytes works in blocks of 64
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 2,
        "max_position_embeddings": 256,
        "pad_token_id": 0,
        "eos_token_id": 1,
        "bos_token_id": None,
        **more,
    }


def vision(**more: object) -> dict:
    """The sizes of a two-layer tower with 16 patches an image."""
    return {
        "hidden_size": 16,
        "intermediate_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "image_size": SIDE,
        "patch_size": 8,
        **more,
    }


def save(model, processor, folder: Path) -> Path:
    """Weights of the usual 0.02 let features of so small a model vanish: nothing could be supervised from them."""
    model.float().eval()
    for parameter in model.parameters():
        if parameter.ndim > 1:
            torch.nn.init.normal_(parameter, std=(2 / parameter[0].numel()) ** 0.5)
    if model.can_generate():
        model.generation_config.eos_token_id, model.generation_config.pad_token_id = 1, 0
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder
