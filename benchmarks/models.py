"""The models of the benchmarks: real classes and processors in the geometry of real models, weights from a seed."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Literal

import torch
from transformers import (
    PreTrainedTokenizerFast,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2_5_VLProcessor,
    Qwen2VLImageProcessor,
    Qwen2VLVideoProcessor,
    SmolVLMConfig,
    SmolVLMForConditionalGeneration,
    SmolVLMImageProcessor,
    SmolVLMProcessor,
    SmolVLMVideoProcessor,
)

from finetune.pocket import model_folder
from finetune.pocket.blueprint import CHAT_TEMPLATE, IMAGE, build_tokenizer
from finetune.pocket.words import WORDS

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from transformers import PreTrainedModel, ProcessorMixin

_TILES = tuple(f"<row_{row}_col_{column}>" for row in (1, 2) for column in (1, 2))
_IDEFICS_TOKENS = ("<fake_token_around_image>", "<global-img>", "<end_of_utterance>", "<video>", *_TILES)
_QWEN_TOKENS = ("<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>")


@dataclass(frozen=True, kw_only=True)
class Setup:
    """A model and the settings of its measurement.

    Attributes:
        title: the title for people.
        save: the function that writes model and processor into a folder of a dtype, and returns the folder to load.
        side: the width and height of an image, in pixels.
        images: the images: of the pocket's world, or smooth noise.
        batch_size: the number of rows of an optimizer step.
        steps: the number of optimizer steps of a round.
        tiles_per_image: the inputs of the vision tower for one image: its tiles, and the whole image.
        projector: whether LoRA adapts the projector too.
        last_layers: the number of upper layers of the language model that LoRA adapts; None for all.
        contestants: the contestants that can train this.
    """

    title: str
    save: Callable[[Path, torch.dtype], Path]
    side: int
    images: Literal["world", "noise"]
    batch_size: int
    steps: int
    tiles_per_image: int
    projector: bool = False
    last_layers: int | None = None
    contestants: tuple[str, ...] = ("trl", "bare", "ours", "stored", "floor")


def save_pocket(folder: Path, dtype: torch.dtype) -> Path:
    """Return the folder of the embedded base: the only model here with trained weights."""
    return model_folder()


def save_smolvlm(
    folder: Path,
    dtype: torch.dtype,
    *,
    tiles: int = 1,
    side: int = 512,
    vision: dict[str, int] | None = None,
    text: dict[str, int] | None = None,
) -> Path:
    """Write a SmolVLM-256M with random weights.

    Args:
        folder: the folder to write to.
        dtype: the dtype of the weights.
        tiles: the number of tiles along each side of an image; above 1 the tower also gets the whole image.
        side: the side of a tile, in pixels.
        vision: the sizes of the tower that differ from the real ones.
        text: the sizes of the language model that differ from the real ones.
    """
    tokens = _tokenizer(*_IDEFICS_TOKENS)
    config = SmolVLMConfig(
        image_token_id=tokens.get_vocab()[IMAGE],
        scale_factor=4,
        tie_word_embeddings=True,
        vision_config={
            "hidden_size": 768,
            "intermediate_size": 3072,
            "num_hidden_layers": 12,
            "num_attention_heads": 12,
            "image_size": side,
            "patch_size": 16,
            **(vision or {}),
        },
        text_config={
            "model_type": "llama",
            "vocab_size": 49280,
            "hidden_size": 576,
            "intermediate_size": 1536,
            "num_hidden_layers": 30,
            "num_attention_heads": 9,
            "num_key_value_heads": 3,
            "max_position_embeddings": 8192,
            "tie_word_embeddings": True,
            **_special_ids(tokens),
            **(text or {}),
        },
    )
    sizes = {"size": {"longest_edge": tiles * side}, "max_image_size": {"longest_edge": side}}
    processor = SmolVLMProcessor(
        SmolVLMImageProcessor(do_image_splitting=tiles > 1, **sizes),
        tokens,
        SmolVLMVideoProcessor(**sizes),
        image_seq_len=(side // 16 // config.scale_factor) ** 2,
        chat_template=CHAT_TEMPLATE,
    )
    torch.manual_seed(0)
    return _save(SmolVLMForConditionalGeneration(config), processor, folder, dtype)


def save_smolvlm_tiles(folder: Path, dtype: torch.dtype) -> Path:
    """Write a SmolVLM-256M whose processor cuts an image into 2 x 2 tiles."""
    return save_smolvlm(folder, dtype, tiles=2)


def save_tiny(folder: Path, dtype: torch.dtype) -> Path:
    """Write a SmolVLM that is small enough to try the benchmark itself."""
    vision = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    text = {"vocab_size": 1300, "hidden_size": 48, "intermediate_size": 64, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 3, "num_key_value_heads": 3}
    return save_smolvlm(folder, dtype, side=64, vision=vision, text=text | heads)


def save_qwen2_5_vl(
    folder: Path, dtype: torch.dtype, *, vision: dict[str, Any] | None = None, text: dict[str, Any] | None = None
) -> Path:
    """Write a Qwen2.5-VL-3B with random weights.

    Args:
        folder: the folder to write to.
        dtype: the dtype of the weights.
        vision: the sizes of the tower that differ from the real ones.
        text: the sizes of the language model that differ from the real ones.
    """
    tokens = _tokenizer(*_QWEN_TOKENS)
    ids = tokens.get_vocab()
    config = Qwen2_5_VLConfig(
        tie_word_embeddings=True,
        vision_config={"depth": 32, "hidden_size": 1280, "intermediate_size": 3420, "num_heads": 16,
                       "patch_size": 14, "window_size": 112, "out_hidden_size": 2048,
                       "fullatt_block_indexes": [7, 15, 23, 31], **(vision or {})},
        text_config={"vocab_size": 151936, "hidden_size": 2048, "intermediate_size": 11008, "num_hidden_layers": 36,
                     "num_attention_heads": 16, "num_key_value_heads": 2, "max_position_embeddings": 128000,
                     "tie_word_embeddings": True, **_special_ids(tokens),
                     "rope_parameters": {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [16, 24, 24]},
                     **(text or {})},
        image_token_id=ids["<|image_pad|>"],
        video_token_id=ids["<|video_pad|>"],
        vision_start_token_id=ids["<|vision_start|>"],
        vision_end_token_id=ids["<|vision_end|>"],
    )  # fmt: skip
    processor = Qwen2_5_VLProcessor(
        Qwen2VLImageProcessor(),
        tokens,
        Qwen2VLVideoProcessor(),
        chat_template=CHAT_TEMPLATE.replace(IMAGE, "<|vision_start|><|image_pad|><|vision_end|>"),
    )
    torch.manual_seed(0)
    # A GPU draws the 3.75 billion weights in a second, a CPU in minutes.
    with torch.device("cuda" if torch.cuda.is_available() else "cpu"):
        model = Qwen2_5_VLForConditionalGeneration(config)
    return _save(model, processor, folder, dtype)


def save_tiny_qwen2_5_vl(folder: Path, dtype: torch.dtype) -> Path:
    """Write a Qwen2.5-VL that is small enough to try the benchmark itself."""
    vision = {
        "depth": 2,
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_heads": 2,
        "out_hidden_size": 64,
        "fullatt_block_indexes": [1],
    }
    text = {
        "vocab_size": 1300,
        "hidden_size": 64,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 2,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [4, 6, 6]},
    }
    return save_qwen2_5_vl(folder, dtype, vision=vision, text=text)  # fmt: skip


_B = Setup(
    title="SmolVLM-256M geometry, 1 tile",
    save=save_smolvlm,
    side=512,
    images="noise",
    batch_size=4,
    steps=2,
    tiles_per_image=1,
)

# Steps and batches are such that a default run on two CPU cores takes about 28 minutes.
SETUPS = {
    "a": Setup(
        title="pocket (3 M parameters)",
        save=save_pocket,
        side=64,
        images="world",
        batch_size=16,
        steps=40,
        tiles_per_image=1,
    ),
    "b": _B,
    "b4": Setup(
        title="SmolVLM-256M geometry, 4 tiles",
        save=save_smolvlm_tiles,
        side=1024,
        images="noise",
        batch_size=4,
        steps=1,
        tiles_per_image=5,
    ),
    "b-projector": replace(
        _B,
        title="SmolVLM-256M geometry, 1 tile, LoRA on the projector too",
        projector=True,
        contestants=("trl", "ours", "stored"),
    ),
    "b-last-third": replace(
        _B,
        title="SmolVLM-256M geometry, 1 tile, LoRA on the last 10 of 30 layers",
        last_layers=10,
        contestants=("trl", "images", "stored"),
    ),
    "qwen": Setup(
        title="Qwen2.5-VL-3B geometry",
        save=save_qwen2_5_vl,
        side=448,
        images="noise",
        batch_size=4,
        steps=20,
        tiles_per_image=1,
    ),
    "tiny-qwen": Setup(
        title="a few layers of Qwen2.5-VL, to try the benchmark",
        save=save_tiny_qwen2_5_vl,
        side=56,
        images="noise",
        batch_size=2,
        steps=2,
        tiles_per_image=1,
    ),
    "tiny": Setup(
        title="a few layers, to try the benchmark",
        save=save_tiny,
        side=64,
        images="noise",
        batch_size=2,
        steps=2,
        tiles_per_image=1,
    ),
}


def _tokenizer(*extra: str) -> PreTrainedTokenizerFast:
    """Return a tokenizer of a few hundred words; the model's own vocabulary has the real size all the same."""
    tokens = build_tokenizer([" ".join(WORDS)] * 2)
    tokens.add_tokens(list(extra), special_tokens=True)
    return tokens


def _special_ids(tokens: PreTrainedTokenizerFast) -> dict[str, int | None]:
    return {"pad_token_id": tokens.pad_token_id, "eos_token_id": tokens.eos_token_id, "bos_token_id": None}


def _save(model: PreTrainedModel, processor: ProcessorMixin, folder: Path, dtype: torch.dtype) -> Path:
    tokens = processor.tokenizer
    model.generation_config.eos_token_id = tokens.eos_token_id
    model.generation_config.pad_token_id = tokens.pad_token_id
    model.to(dtype).save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder
