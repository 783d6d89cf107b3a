"""Whatever a row holds, for every family it becomes a training batch or one of our errors that names file and row."""

import io
import json
import re

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from finetune.assemble.loading import load_base
from finetune.data.lengths import fitting
from finetune.data.splits import read_split, tally
from finetune.errors import DataError, FinetuneError
from finetune.recipe import JsonlData
from finetune.tasks.contrastive import ContrastiveConfig
from tests.data.conftest import TASK

QUICK = settings(
    max_examples=30,
    deadline=None,
    derandomize=True,
    database=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow, HealthCheck.data_too_large],
)
SLOW = settings(QUICK, max_examples=2000)
PAIRS = ContrastiveConfig(name="contrastive", text_template="a photo of {label}")

MARKS = (
    "<image>",
    "<|image_pad|>",
    "<|end|>",
    "<|assistant|>",
    "<video>",
    "<|video_pad|>",
    "<loc0001>",
    "<row_1_col_1>",
)
NASTY = (
    "", " ", "\n", "\0", "a\0b", "\ud800", "a\udfffb", "\u202e", "\ufeff", "\u2028", "e\u0301",
    "\U0001f468\u200d\U0001f469",    "{question}",
    "{{ 7 * 7 }}", "{% raw %}", "{# c #}", "%s", "\\", '"', "<", "</s>", "<s>", "[INST]", "x" * 300,
    "\u0600\u0601", "\u1160" * 9, "a\u0300\u0301\u0302", "\r", "\t", "\x1b[31m", "\u00a0",
)  # fmt: skip


def _encoded(image, kind, **options):
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def _files():
    """Name -> bytes of images good and bad."""
    rng = np.random.default_rng(0)
    rgb = Image.fromarray(rng.integers(0, 255, (40, 30, 3), dtype=np.uint8))
    deep = Image.fromarray(rng.integers(0, 4095, (20, 30)).astype(np.uint16))
    palette = rgb.convert("P")
    sizes = ((1, 1), (1, 40), (40, 1), (1, 150), (199, 1), (200, 1), (1, 300), (6000, 20), (2, 2), (3, 500))
    files = {f"size{w}x{h}.png": _encoded(Image.new("RGB", (w, h), "red"), "PNG") for w, h in sizes}
    files |= {
        "rgb.png": _encoded(rgb, "PNG"),
        "rgb.jpg": _encoded(rgb, "JPEG"),
        "cmyk.jpg": _encoded(rgb.convert("CMYK"), "JPEG"),
        "palette.png": _encoded(palette, "PNG"),
        "transparent.png": _encoded(palette, "PNG", transparency=3),
        "grey.png": _encoded(rgb.convert("L"), "PNG"),
        "la.png": _encoded(rgb.convert("LA"), "PNG"),
        "bits.png": _encoded(rgb.convert("1"), "PNG"),
        "deep.png": _encoded(deep, "PNG"),
        "signed.tiff": _encoded(Image.fromarray(np.array([[-5, 9]], np.int32)), "TIFF"),
        "float.tiff": _encoded(Image.fromarray(np.ones((3, 3), np.float32)), "TIFF"),
        "lab.tiff": _encoded(rgb.convert("LAB"), "TIFF"),
        "pages.tiff": _encoded(rgb, "TIFF", save_all=True, append_images=[rgb]),
        "moving.gif": _encoded(palette, "GIF", save_all=True, append_images=[palette.rotate(90)]),
        "lfs.png": b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 1\n",
        "empty.png": b"",
    }
    for name in ("rgb.png", "rgb.jpg", "deep.png", "moving.gif", "pages.tiff"):
        whole = files[name]
        files[f"half_{name}"] = whole[: len(whole) // 2]
        files[f"flipped_{name}"] = whole[:60] + bytes(byte ^ 255 for byte in whole[60:90]) + whole[90:]
    return files


FILES = _files()
PATHS = ("no.png", "", " ", ".", "..", "folder", "a\0.png", "\ud800.png", "y" * 300, "z/" * 3000,
         "data:image/png;base64,AA", "https://example.org/x.png", "/9j/" + "A" * 400, "~", "//", "con")  # fmt: skip

texts = st.one_of(
    st.sampled_from(("What is it?", "red", "two words")),
    st.sampled_from(NASTY),
    st.sampled_from(MARKS),
    st.text(max_size=30),
    st.tuples(st.text(max_size=5), st.sampled_from((*MARKS, *NASTY)), st.text(max_size=5)).map("".join),
)
numbers = st.one_of(st.integers(), st.just(10**400), st.floats(), st.booleans())
anything = st.recursive(
    st.one_of(st.none(), numbers, texts),
    lambda inner: st.one_of(st.lists(inner, max_size=3), st.dictionaries(texts, inner, max_size=3)),
    max_leaves=6,
)
deep = st.integers(1, 90).map(lambda depth: json.loads("[" * depth + "]" * depth))
good = st.sampled_from(sorted(FILES))
paths = st.one_of(good, good, st.sampled_from(PATHS), texts)


def mostly(strategy):
    """What a field should hold, and seldom anything else."""
    return st.one_of(strategy, strategy, strategy, anything, deep)


questions = st.fixed_dictionaries(
    {},
    optional={
        "image": mostly(st.one_of(st.none(), paths)),
        "images": mostly(st.lists(paths, max_size=3)),
        "question": mostly(texts),
        "answer": mostly(st.one_of(texts, st.lists(texts, max_size=3))),
        "captions": st.one_of(st.none(), mostly(st.lists(texts, max_size=3))),
        "system": st.one_of(st.none(), texts),
        "history": st.one_of(st.none(), anything),
    },
)
plain_rows = st.fixed_dictionaries({"image": good, "question": texts, "answer": texts})
parts = mostly(
    st.one_of(
        texts.map(lambda text: {"type": "text", "text": text}),
        st.fixed_dictionaries(
            {"type": st.just("image")}, optional={"image": paths, "path": paths, "index": st.integers(-1, 2)}
        ),
    )
)
messages = st.fixed_dictionaries(
    {
        "role": mostly(st.sampled_from(("user", "assistant", "system"))),
        "content": mostly(st.one_of(texts, st.lists(parts))),
    },
    optional={"weight": mostly(st.sampled_from((0, 1))), "loss": st.booleans(), "train": anything, "name": texts},
)
turns = st.lists(st.tuples(parts, texts), min_size=1, max_size=3).map(
    lambda pairs: [
        message
        for part, text in pairs
        for message in ({"role": "user", "content": [part, {"type": "text", "text": "?"}]}, _assistant(text))
    ]
)
conversations = st.fixed_dictionaries(
    {"messages": st.one_of(turns, turns, mostly(st.lists(messages, max_size=5)))},
    optional={"image": mostly(paths), "images": mostly(st.lists(paths, max_size=3)), "system": texts},
)
rows = st.one_of(plain_rows, questions, conversations)


def _assistant(text):
    return {"role": "assistant", "content": text}


@pytest.fixture(scope="session")
def any_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("any")
    for name, data in FILES.items():
        (folder / name).write_bytes(data)
    (folder / "folder").mkdir()
    return folder


@pytest.fixture(scope="session")
def any_base(tiny_family):
    return load_base(str(tiny_family), device="cpu")


@pytest.fixture(scope="session")
def any_clip(tiny_clip):
    return load_base(str(tiny_clip), device="cpu")


def check(base, folder, row, task=TASK):
    """Read a row, checks it and make a batch of it, as a run does."""
    (folder / "train.jsonl").write_text(json.dumps(row) + "\n")
    section = JsonlData(source="jsonl", root=str(folder))
    bad = tally(section, "train", log=lambda text: None)
    limit = getattr(base.collator, "max_length", 4096)  # of a dual encoder that of its texts
    try:
        examples = read_split(section, "train", task=task, seed=0, bad=bad)
        examples = fitting(examples, base.lengths(base.default_task), section, "train", limit=limit, room=0, bad=bad)
    except FinetuneError as error:
        assert isinstance(error, DataError)
        assert re.search(r"train.jsonl(, line 1|:1)|train rows", str(error)), str(error)
        assert len(str(error)) < 2000, "a row is not printed whole"
        str(error).encode()  # and can be printed at all
        return
    batch = base.collator.training_batch(examples)
    assert (batch.labels != -100).any()
    assert all(torch.isfinite(value).all() for value in batch.inputs.values() if torch.is_floating_point(value))
    if task is TASK:  # a dual encoder is asked with choices, which a whole split brings
        base.collator.prompt_batch(examples)


@QUICK
@given(row=rows)
def test_any_row_is_usable_or_named(any_base, any_folder, row):
    check(any_base, any_folder, row)


@pytest.mark.slow
@SLOW
@given(row=rows)
def test_any_of_many_rows_is_usable_or_named(any_base, any_folder, row):
    check(any_base, any_folder, row)


@QUICK
@given(row=rows)
def test_any_row_is_a_pair_or_named(any_clip, any_folder, row):
    check(any_clip, any_folder, row, task=PAIRS)


@pytest.mark.slow
@SLOW
@given(row=rows)
def test_any_of_many_rows_is_a_pair_or_named(any_clip, any_folder, row):
    check(any_clip, any_folder, row, task=PAIRS)
