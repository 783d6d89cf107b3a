"""The rows that every contestant reads: PNG files of different images, and answers of one length."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

import numpy as np
from PIL import Image

from finetune.pocket.drawing import COLORS, PATTERNS, SHAPES
from finetune.pocket.world import draw_scene

if TYPE_CHECKING:
    from pathlib import Path

    from transformers import PreTrainedTokenizerBase

    from benchmarks.models import Setup

ANSWER_TOKENS = 24  # tokens of an answer, the one that ends it included
QUESTION = "What does the image show?"
_CELLS = 32  # of the coarse noise that an image is, along each side


def write_rows(folder: Path, setup: Setup, tokenizer: PreTrainedTokenizerBase, *, num_rows: int, seed: int = 0) -> Path:
    """Write ``train.jsonl`` and its images; return ``folder``."""
    (folder / "images").mkdir(parents=True)
    words = _words(tokenizer)
    lines = []
    for index in range(num_rows):
        rng = np.random.default_rng([seed, index])
        image = _image(setup, rng, seed, index)
        name = f"images/{index}.png"
        Image.fromarray(image).save(folder / name)
        answer = " ".join(rng.choice(words, ANSWER_TOKENS - 1).tolist())
        lines.append(json.dumps({"image": name, "question": QUESTION, "answer": answer}))
    (folder / "train.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    return folder


def write_questions(folder: Path, setup: Setup, *, num_images: int, seed: int = 0) -> Path:
    """Write ``train.jsonl`` with two questions about each image, of different lengths; return ``folder``."""
    (folder / "images").mkdir(parents=True)
    lines = []
    for index in range(num_images):
        rng = np.random.default_rng([seed, index])
        name = f"images/{index}.png"
        Image.fromarray(_image(setup, rng, seed, index)).save(folder / name)
        for _ in range(2):
            words = rng.choice([*COLORS, *SHAPES], rng.integers(1, 8)).tolist()
            lines.append(json.dumps({"image": name, "question": f"Is there a {' or a '.join(words)}?", "answer": ""}))
    (folder / "train.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    return folder


def read_rows(folder: Path) -> list[dict[str, str]]:
    """Return the rows of the file, the image's path made absolute."""
    rows = [json.loads(line) for line in (folder / "train.jsonl").read_text(encoding="utf-8").splitlines()]
    return [row | {"image": str(folder / row["image"])} for row in rows]


def _words(tokenizer: PreTrainedTokenizerBase) -> list[str]:
    """Return words that are one token each behind a space, so that an answer of n words has n tokens."""
    every = sorted({*COLORS, *SHAPES, *PATTERNS})
    return [word for word in every if len(tokenizer(f" {word}", add_special_tokens=False)["input_ids"]) == 1]


def _image(setup: Setup, rng: np.random.Generator, seed: int, index: int) -> np.ndarray:
    return draw_scene(seed, "benchmark", index).image if setup.images == "world" else _noise(rng, setup.side)


def _noise(rng: np.random.Generator, side: int) -> np.ndarray:
    """Return [side, side, 3] uint8: coarse noise made smooth, with a little grain, as a photograph has."""
    coarse = Image.fromarray(rng.integers(0, 256, (_CELLS, _CELLS, 3), dtype=np.uint8))
    smooth = np.asarray(coarse.resize((side, side), Image.Resampling.BICUBIC), np.int16)
    return (smooth + rng.integers(-4, 5, smooth.shape, dtype=np.int16)).clip(0, 255).astype(np.uint8)
