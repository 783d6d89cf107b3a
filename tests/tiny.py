"""Tiny random models of the real classes, with their real processor classes, saved as the hub lays them out."""

from pathlib import Path

import torch
from transformers import (
    FastVlmConfig,
    FastVlmForConditionalGeneration,
    Idefics3Config,
    Idefics3ForConditionalGeneration,
    Idefics3ImageProcessor,
    Idefics3Processor,
    LlavaProcessor,
    MobileNetV2Config,
    PreTrainedTokenizerFast,
    Qwen2Config,
    ViTImageProcessor,
)

from finetune.pocket.blueprint import CHAT_TEMPLATE, build_tokenizer

SIDE = 32  # pixels
_TEXTS = ["What color is it? red", "Is it a circle? yes no", "How many? one two three", "blue green left right"]
_IDEFICS_TOKENS = ["<fake_token_around_image>", "<global-img>"]


def _tokenizer(extra: list[str] = []) -> PreTrainedTokenizerFast:  # noqa: B006
    tokenizer = build_tokenizer(_TEXTS)
    tokenizer.add_tokens(extra, special_tokens=True)
    return tokenizer


def _text(tokenizer: PreTrainedTokenizerFast) -> dict:
    return {
        "vocab_size": len(tokenizer),
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 2,
        "max_position_embeddings": 256,
        "pad_token_id": 0,
        "eos_token_id": 1,
        "bos_token_id": None,
    }


def save_idefics3(folder: Path, *, seed: int = 0) -> Path:
    """Idefics3 with 4 image tokens a picture."""
    tokenizer = _tokenizer(_IDEFICS_TOKENS)
    torch.manual_seed(seed)
    config = Idefics3Config(
        image_token_id=tokenizer.get_vocab()["<image>"],
        scale_factor=2,
        vision_config={
            "hidden_size": 16,
            "intermediate_size": 32,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "image_size": SIDE,
            "patch_size": 8,
        },
        text_config={"model_type": "llama", **_text(tokenizer)},
    )
    images = Idefics3ImageProcessor(
        do_image_splitting=False, size={"longest_edge": SIDE}, max_image_size={"longest_edge": SIDE}
    )
    processor = Idefics3Processor(images, tokenizer, image_seq_len=4, chat_template=CHAT_TEMPLATE)
    return _save(Idefics3ForConditionalGeneration(config), processor, folder)


def save_fast_vlm(folder: Path, *, seed: int = 0) -> Path:
    """FastVLM on a MobileNetV2, whose batch norms break when a frozen tower is put in training mode."""
    tokenizer = _tokenizer()
    torch.manual_seed(seed)
    vision = MobileNetV2Config(depth_multiplier=0.35, image_size=SIDE, finegrained_output=True)
    vision.hidden_size = 1280
    config = FastVlmConfig(
        vision_config=vision,
        text_config=Qwen2Config(**_text(tokenizer)),
        image_token_index=tokenizer.get_vocab()["<image>"],
        image_seq_length=1,
    )
    images = ViTImageProcessor(size={"height": SIDE, "width": SIDE}, image_mean=[0.5] * 3, image_std=[0.5] * 3)
    processor = LlavaProcessor(
        images,
        tokenizer,
        patch_size=32,
        vision_feature_select_strategy="full",
        image_token="<image>",
        chat_template=CHAT_TEMPLATE,
    )
    return _save(FastVlmForConditionalGeneration(config), processor, folder)


FAMILIES = {"idefics3": save_idefics3, "fast_vlm": save_fast_vlm}


def _save(model, processor, folder: Path) -> Path:
    """Weights of the usual 0.02 let features of so small a model vanish: nothing could be learnt from them."""
    model.float().eval()
    for parameter in model.parameters():
        if parameter.ndim > 1:
            torch.nn.init.normal_(parameter, std=(2 / parameter[0].numel()) ** 0.5)
    model.generation_config.eos_token_id, model.generation_config.pad_token_id = 1, 0
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder
