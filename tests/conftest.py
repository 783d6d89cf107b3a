"""What every test gets: its own home, registry and cache; nothing from the user's; no colours, no network.

``seeding.py`` seeds it.
"""

import json
import logging
import os
import sys
import warnings

os.environ["HF_HUB_OFFLINE"] = "1"  # read when huggingface_hub is imported
# bitsandbytes wraps functions for torch.compile when it is imported, which costs each process of a test two seconds.
os.environ["TORCHDYNAMO_DISABLE"] = "1"

import numpy as np
import pytest
from PIL import Image

from tests.seeding import (  # noqa: F401  hooks of pytest
    pytest_fixture_setup,
    pytest_make_collect_report,
    pytest_runtest_setup,
)


def _generative_families():
    from finetune.tables import FAMILIES

    return [name for name, entry in FAMILIES.items() if entry.architecture == "generative"]


@pytest.fixture(autouse=True)
def own_places(tmp_path, monkeypatch):
    """Isolates the user's directories and environment."""
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setenv("FINETUNE_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("FINETUNE_REGISTRY", str(tmp_path / "registry"))
    for name in ("NUM_PROCESSES", "SIGNING_KEY", "SIGNING_PASSPHRASE", "TRUST", "SEEN"):
        monkeypatch.delenv(f"FINETUNE_{name}", raising=False)
    umask = os.umask(0o022)  # trust policies that a group may write are refused
    yield
    os.umask(umask)


@pytest.fixture
def rested(monkeypatch):
    """Take every file as one that has rested, so that notes are kept of files that a test has just written."""
    monkeypatch.setattr("finetune.core.file_state._rest_seconds", lambda path, device: 0.0)


@pytest.fixture(autouse=True)
def own_logging():
    """Give the package's loggers back as they are at its import: some tests look at what is logged."""
    yield
    logging.disable(logging.NOTSET)
    for name in [name for name in logging.root.manager.loggerDict if name.partition(".")[0] == "finetune"]:
        logger = logging.getLogger(name)
        logger.disabled, logger.propagate = False, True
        logger.setLevel(logging.NOTSET)


@pytest.fixture(scope="session", params=["idefics3", "fast_vlm"])
def tiny_base(request, tmp_path_factory):
    """The folder of a tiny model; one test a family."""
    from tests.tiny import FAMILIES

    return FAMILIES[request.param](tmp_path_factory.mktemp("tiny") / request.param)


@pytest.fixture(scope="session", params=_generative_families())
def tiny_family(request, tmp_path_factory):
    """The folder of a tiny model of each family that generates text."""
    from tests.tiny import FAMILIES

    return FAMILIES[request.param](tmp_path_factory.mktemp("tiny") / request.param)


@pytest.fixture(scope="session")
def tiny_fast_vlm(tmp_path_factory):
    """The folder of a tiny FastVLM, for what does not differ between families."""
    from tests.tiny import save_fast_vlm

    return save_fast_vlm(tmp_path_factory.mktemp("tiny") / "fast_vlm")


@pytest.fixture(scope="session")
def tiny_idefics3(tmp_path_factory):
    """The folder of a tiny Idefics3, in which every method finds something to adapt."""
    from tests.tiny import save_idefics3

    return save_idefics3(tmp_path_factory.mktemp("tiny") / "idefics3")


@pytest.fixture(scope="session")
def tiny_clip(tmp_path_factory):
    """The folder of a tiny CLIP."""
    from tests.tiny import save_clip

    return save_clip(tmp_path_factory.mktemp("tiny") / "clip")


@pytest.fixture
def rows_folder(tmp_path):
    """A folder with rows about red and blue squares, learnable in a few steps, and answers of several lengths."""
    folder = tmp_path / "data"
    (folder / "images").mkdir(parents=True)
    rng = np.random.default_rng(0)
    rows = []
    for i in range(26):
        color = ("red", "blue")[i % 2]
        pixels = rng.integers(0, 60, (40, 32, 3), dtype=np.uint8)
        pixels[..., 0 if color == "red" else 2] += 180
        Image.fromarray(pixels).save(folder / "images" / f"{i}.png")
        answer = color if i % 3 else f"it is {color}, I think"
        rows.append({"image": f"images/{i}.png", "question": "What color is it?", "answer": answer})
    for split, chosen in (("train", rows[:18]), ("val", rows[18:22]), ("test", rows[22:])):
        (folder / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in chosen))
    return folder


@pytest.fixture
def make_recipe(rows_folder, tmp_path):
    """Return a function that builds a recipe on the rows above; sections are merged into it, but another task."""
    from finetune.recipe import parse_recipe

    def make(base, **changes):
        raw = {
            "name": "squares",
            "domain": "testing",
            "model": {"name_or_path": str(base), "device": "cpu"},
            "method": {"name": "lora", "r": 4, "lora_alpha": 8, "towers": {"projector": "all-linear"}},
            "data": {"source": "jsonl", "root": str(rows_folder)},
            "task": {"max_new_tokens": 4},
            "train": {"max_steps": 3, "batch_size": 4, "learning_rate": 0.01, "output_dir": str(tmp_path / "runs")},
            "adapter": {"publish": "testing/squares"},
        }
        for section, values in changes.items():
            merged = isinstance(values, dict) and (section, "name" in values) != ("task", True)
            raw[section] = {**raw[section], **values} if merged else values
        return parse_recipe(raw, source="test recipe")

    return make


@pytest.fixture(autouse=True)
def accelerate_state():
    """Restores accelerate's process state."""
    yield
    if "accelerate" in sys.modules:
        from accelerate.state import AcceleratorState, GradientState

        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            AcceleratorState._reset_state(True)
            GradientState._reset_state()
