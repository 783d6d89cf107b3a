"""What people have in their files instead of rows: each named with what to do, and left out by ``on_error: skip``."""

import base64
import json
import unicodedata
from dataclasses import replace

import numpy as np
import pytest
from PIL import Image

from finetune.assemble.loading import base_of, load_base
from finetune.core.example import Example, answer, as_images, ask
from finetune.data.images import open_image, read_through
from finetune.errors import DataError, IntegrityError, ModelError, RecipeError, RowError
from finetune.recipe import ParquetData, SavedData
from finetune.recipe.recipe_file import parse_recipe
from tests.data.conftest import ROW, read_rows

POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 12345\n"
GOOD = 25
LONG = "x" * 5000
BASE64 = base64.b64encode(bytes(range(256)) * 8).decode()

STRANGE = {
    "a data URI": (
        {**ROW, "image": f"data:image/png;base64,{BASE64}"}, "an image must be the path of its file, got the URL",
    ),
    "base64": ({**ROW, "image": BASE64}, "looks like base64. Save the image as a file"),
    "a URL": ({**ROW, "image": "https://example.org/a.png"}, "got the URL 'https://example.org/a.png'. Save the image"),
    "a path that is too long": ({**ROW, "image": LONG + ".png"}, "does not exist"),
    "a NUL in a path": ({**ROW, "image": "a\0.png"}, r"a\\x00.png' does not exist"),
    "a lone surrogate in a path": (b'{"image": "\\ud800.png", "question": "?", "answer": "x"}', "lone surrogate"),
    "a folder": ({**ROW, "image": "sub"}, "must be the path of its file, got the folder .*sub"),
    "a lone surrogate": (
        b'{"image": "good.png", "question": "a \\uD83D b", "answer": "x"}', "half of one .a lone surrogate.",
    ),
    "a lone surrogate in a key": (b'{"image": "good.png", "question": "?", "answer": "x", "\\udc00": 1}', "lone surr"),
    "a key that stands twice": (
        b'{"image": "good.png", "question": "a", "question": "b"}', "a key must be unique, but 'question' is given",
    ),
    "a key that stands twice inside": (
        b'{"messages": [{"role": "user", "role": "x"}]}', "a key must be unique, but 'role' is given twice",
    ),
    "values that are nested deep": (
        b'{"answer": ' + b"[" * 500 + b"]" * 500 + b"}", "nested in at most 32 levels, got more",
    ),
    "a huge number": (b'{"answer": ' + b"9" * 5000 + b"}", "not JSON: Exceeds the limit"),
    "a large number": ({**ROW, "answer": 10**300}, "'answer' must be a non-empty text or a list of non-empty texts"),
    "infinity": (
        b'{"image": "good.png", "question": Infinity, "answer": "x"}', "'question' must be a non-empty text, got inf",
    ),
    "a truth value for an image": ({**ROW, "image": True}, "an image must be the path of its file, got True"),
    "a truth value for a conversation": (
        {"messages": True}, "a conversation must be a non-empty list of messages, got True",
    ),
    "no question": ({"image": "good.png", "answer": "x"}, "or set the question .*data.default_question"),
}  # fmt: skip


@pytest.mark.parametrize("kind", STRANGE)
def test_a_strange_row_is_named_or_skipped(read, folder, kind):
    line, message = STRANGE[kind]
    (folder / "sub").mkdir()
    lines = [*[ROW] * GOOD, line]
    with pytest.raises(RowError, match=rf"(?s)^.*train.jsonl, line {GOOD + 1}: .*{message}") as found:
        read(*lines)
    assert len(str(found.value)) < 1000, "what stands in the row is not printed whole"
    logged = []
    assert len(read(*lines, on_error="skip", logged=logged)) == GOOD and len(logged[0]) < 1500


def test_null_is_a_row_without_an_image(read):
    """A field that is absent may have another name."""
    logged = []
    first, second = read({**ROW, "image": None}, ROW, logged=logged)
    assert logged == ["1 of 2 train rows have no image; the run uses them without one"]
    assert first.images == [] and len(second.images) == 1
    assert [part["type"] for part in first.messages[0]["content"]] == ["text"]
    with pytest.raises(
        RowError,
        match="a row must have the field 'image', got .*data.image=FIELD, write \"image\": null in a row without",
    ):
        read({"question": "?", "answer": "x"})
    turns = [{"role": "user", "content": "?"}, {"role": "assistant", "content": "x"}]
    assert read({"messages": turns, "image": None})[0].images == []


def test_a_file_that_is_no_json_lines_is_named(read):
    rows = [ROW, ROW]
    with pytest.raises(
        DataError,
        match=r"train.jsonl: a JSON Lines file must have one object a line, got one JSON array.*Convert it: python -c",
    ):
        read(json.dumps(rows).encode())
    with pytest.raises(DataError, match="got one JSON array"):
        read(json.dumps(rows, indent=1).encode())
    for text in (json.dumps(ROW, indent=1), json.dumps(ROW, indent=1) + "\n" + json.dumps(ROW, indent=1)):
        with pytest.raises(
            DataError, match="one object a line, got an object that spreads over several lines.*jq -c . train.jsonl"
        ):
            read(text.encode())
    assert len(read(b"", b"  ", json.dumps(ROW).encode())) == 1


def test_the_command_that_is_named_converts_an_array(read, folder, tmp_path):
    import subprocess

    with pytest.raises(DataError) as found:
        read(json.dumps([ROW, ROW], indent=1).encode())
    command = str(found.value).partition("Convert it: ")[2].replace("python", "python3", 1)
    subprocess.run(command, shell=True, check=True, cwd=folder)
    assert [json.loads(line) for line in (folder / "rows.jsonl").read_text().splitlines()] == [ROW, ROW]


@pytest.mark.parametrize(("written", "found"), [("NFC", "NFD"), ("NFD", "NFC")])
def test_names_that_differ_in_how_accents_are_written(read, folder, written, found):
    name = "Übersicht é.png"
    (folder / "good.png").rename(folder / unicodedata.normalize(found, name))
    (row,) = read({**ROW, "image": unicodedata.normalize(written, name)})
    assert row.images[0].is_file()


def test_pointers_of_git_lfs_are_named(read, folder, tiny_fast_vlm, tmp_path, make_recipe):
    (folder / "x.png").write_bytes(POINTER)
    with pytest.raises(RowError, match="x.png: a Git LFS pointer.*git lfs pull"):
        read({**ROW, "image": "x.png"})
    with pytest.raises(DataError, match="train.jsonl: a Git LFS pointer"):
        read(POINTER)
    (folder / "train.parquet").write_bytes(POINTER)
    for streaming in (False, True):
        section = ParquetData(source="parquet", root=str(folder), streaming=streaming)
        with pytest.raises(DataError, match="train.parquet: a Git LFS pointer"):
            _opened(section)
    (folder / "saved").mkdir()
    (folder / "saved" / "dataset_info.json").write_text("{}")
    (folder / "saved" / "data-00000-of-00001.arrow").write_bytes(POINTER)
    with pytest.raises(DataError, match="data-00000-of-00001.arrow: a Git LFS pointer"):
        read_rows(SavedData(source="saved", root=str(folder), train="saved"))


def _opened(section):
    from finetune.data.open_stream import open_stream
    from finetune.data.splits import tally
    from tests.data.conftest import TASK

    if section.streaming:
        return open_stream(section, task=TASK, seed=0, bad=tally(section, "train", log=print))
    return read_rows(section)


@pytest.mark.parametrize("name", ["model.safetensors", "tokenizer.json", "config.json"])
def test_a_base_that_was_not_fetched_is_named(tiny_fast_vlm, tmp_path, make_recipe, name):
    import shutil

    base = shutil.copytree(tiny_fast_vlm, tmp_path / "base")
    (base / name).write_bytes(POINTER)
    with pytest.raises(ModelError, match=rf"{name}: a Git LFS pointer.*git lfs pull"):
        base_of(make_recipe(base))


def test_an_adapter_that_was_not_fetched_is_named(tiny_fast_vlm, tmp_path):
    from finetune.adapters.folder import read_folder
    from tests.serving.adapters import make_adapter

    folder = make_adapter(load_base(str(tiny_fast_vlm), device="cpu"), "lora", tmp_path / "a", seed=0, name="a")
    for name in ("adapter_model.safetensors", "manifest.json"):
        (folder / name).write_bytes(POINTER)
        with pytest.raises(IntegrityError, match=f"{name}: a Git LFS pointer"):
            read_folder(folder)


SOURCES = {
    "csv": "convert it to JSON Lines",
    "json": "use data.source=jsonl",
    "imagefolder": "use data.source=hub with data.root=FOLDER",
    "ImageFolder": "use data.source=hub",
    "huggingface": "use data.source=hub",
    "json-lines": "use data.source=jsonl",
    "save_to_disk": "use data.source=saved",
    "parquets": "Did you mean 'parquet'",
    "jsnl": "Did you mean 'jsonl'",
}


@pytest.mark.parametrize("source", SOURCES)
def test_a_source_by_another_name_is_answered(source):
    for data in ({"source": source}, {"source": "mix", "sources": {"a": {"data": {"source": source}}}}):
        with pytest.raises(RecipeError, match=rf"x: unknown data.source '{source}'.*{SOURCES[source]}.*Allowed: hub, "):
            parse_recipe({"data": data}, source="x")


def image(size):
    return Example(
        id="x",
        messages=[*ask("What?"), answer("x")],
        media=as_images([np.zeros((size[1], size[0], 3), np.uint8)]),
        answers=["x"],
    )


@pytest.mark.parametrize("size", [(6000, 20), (1, 300), (300, 1)])
def test_an_image_far_longer_than_wide_is_refused(folder, size):
    Image.new("L", size).save(folder / "x.png")
    for call in (open_image, read_through):
        with pytest.raises(
            RowError, match=f"x.png: .* must be at most 200 times as long .*, got {size[0]} x {size[1]}"
        ):
            call(folder / "x.png")


def test_what_a_processor_refuses_names_the_row(tiny_family, monkeypatch):
    base = load_base(str(tiny_family), device="cpu")
    real = base.family._encode

    def encode(processor, texts, images, side):
        if any(image.size[0] == 77 for row in images for image in row):
            raise ValueError("absolute aspect ratio must be smaller\nthan that")
        return real(processor, texts, images, side)

    monkeypatch.setattr(base.family, "_encode", encode)
    rows = [replace(image((32, 32)), id="good"), replace(image((77, 32)), id="bad")]
    for call in (base.collator.training_batch, base.collator.prompt_batch):
        with pytest.raises(
            RowError,
            match="row bad: .*Processor cannot encode these texts and images. "
            "Change them: absolute aspect ratio must be smaller$",
        ):
            call(rows)
    with pytest.raises(RowError, match="row bad, images of 77 x 32: .*Processor cannot encode these texts and images"):
        base.lengths(base.default_task).of_training_row(rows[1], [(77, 32)])


def test_a_tokenizer_larger_than_the_embedding_is_refused_before_training(tiny_fast_vlm):
    base = load_base(str(tiny_fast_vlm), device="cpu")
    base.processor.tokenizer.add_tokens(["zebra"])
    known = len(base.processor.tokenizer) - 1
    bad = replace(image((32, 32)), messages=[*ask("a zebra?"), answer("x")])
    base.lengths(base.default_task).of_training_row(image((32, 32)), [(32, 32)])
    for call in (
        lambda: base.lengths(base.default_task).of_training_row(bad, [(32, 32)]),
        lambda: base.collator.prompt_batch([bad]),
    ):
        with pytest.raises(
            RowError, match=rf"got 'zebra' \(token {known}\), and the base has embeddings for {known} tokens only"
        ):
            call()
