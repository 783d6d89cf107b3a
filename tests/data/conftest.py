"""Rows and images to read, good and bad."""

import json

import pytest
from PIL import Image

from finetune.data.splits import read_split, tally
from finetune.recipe import JsonlData
from finetune.tasks.vqa import VqaConfig

TASK = VqaConfig()
ROW = {"image": "good.png", "question": "What?", "answer": "x"}


def read_rows(section, split="train", *, logged=None, task=TASK, seed=0):
    """Read one split; ``logged`` collects the log messages."""
    bad = tally(section, split, log=(logged if logged is not None else []).append)
    examples = read_split(section, split, task=task, seed=seed, bad=bad)
    bad.conclude()
    return examples


@pytest.fixture
def folder(tmp_path):
    """A folder with one good image."""
    Image.new("RGB", (4, 4), "red").save(tmp_path / "good.png")
    return tmp_path


@pytest.fixture
def read(folder):
    """Return a function that writes lines as JSON Lines and read them."""

    def read(*lines, logged=None, seed=0, task=TASK, **fields):
        raw = [line if isinstance(line, bytes) else json.dumps(line).encode() for line in lines]
        (folder / "train.jsonl").write_bytes(b"\n".join(raw) + b"\n")
        section = JsonlData(source="jsonl", root=str(folder), **fields)
        return read_rows(section, logged=logged, task=task, seed=seed)

    return read
