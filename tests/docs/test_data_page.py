"""docs/data.md: its rows are read by the source and the fields that its recipes name."""

import json
import re
from pathlib import Path

import pytest
from PIL import Image

from finetune.data.other_fields import FIELD_KEYS
from finetune.data.splits import read_split, tally
from finetune.recipe import ColumnData, parse_recipe, read_value
from finetune.tables import SOURCES
from tests.docs.test_pages import WHOLE
from tests.docs_code import DOCS, sections

PAGE = "data.md"
SECTIONS = sections(PAGE)


def code(section, language):
    return re.findall(rf"^```{language}\n(.*?)^```$", SECTIONS[section], re.MULTILINE | re.DOTALL)


def read(recipe, split="train"):
    told = []
    bad = tally(recipe.data, split, log=told.append)
    rows = read_split(recipe.data, split, task=recipe.task, seed=0, bad=bad)
    bad.conclude()
    return rows, told


def recipe_of(text):
    return parse_recipe({**WHOLE, **read_value(text, source=PAGE)}, source=PAGE)


@pytest.fixture(autouse=True)
def images(tmp_path, monkeypatch):
    """The images that the rows name, below every root that a recipe names."""
    monkeypatch.chdir(tmp_path)
    for root in (".", "scans", "clothes"):
        (tmp_path / root / "img").mkdir(parents=True)
        for number in (1, 2):
            Image.new("RGB", (8, 8), (0, 90 * number, 0)).save(tmp_path / root / "img" / f"{number}.png")


@pytest.mark.parametrize("section", [name for name in SECTIONS if code(name, "jsonl")])
def test_rows_are_read(section, tmp_path):
    (lines,), (text,) = code(section, "jsonl"), code(section, "yaml")
    recipe = recipe_of(text)
    (tmp_path / recipe.data.root / "train.jsonl").write_text(lines, encoding="utf-8")
    rows, told = read(recipe)
    assert len(rows) == len(lines.splitlines()) and not [line for line in told if "not read" in line]
    shown = [json.loads(line) for line in lines.splitlines()]
    for row, raw in zip(rows, shown, strict=True):
        named = raw.get("images") or [raw[key] for key in ("image", "file") if raw.get(key)]
        inside = re.findall(r'"path": "(.*?)"', json.dumps(raw))
        assert [path.name for path in row.images] == [name.rpartition("/")[2] for name in named + inside]
    if section == "A question and its answer":
        assert [row.answers for row in rows][1] == ["no", "none"]
    if section == "Fields of other names":
        assert rows[0].id == "1" and rows[0].answers == ["pneumonia"]
        assert rows[0].meta["question"] == "What does the scan show?"
    if section == "Captions":
        assert len(rows[0].captions) == 2
    if section == "Labels for CLIP":
        assert rows[0].messages[-1]["content"][0]["text"] == "a photo of shirt"


def test_tables_are_written_and_read():
    section = "Parquet, and folders of datasets"
    (script,) = code(section, "python")
    exec(compile(script, PAGE, "exec"), {})
    for text in code(section, "yaml"):
        for split in ("train", "val", "test"):
            rows, _ = read(recipe_of(text), split)
            assert [row.answers for row in rows] == [["yes"], ["no"]] and all(len(row.images) == 1 for row in rows)
    (mix,) = code("A mix", "yaml")
    (lines,) = code("A question and its answer", "jsonl")
    Path("scans/train.jsonl").write_text(lines, encoding="utf-8")
    rows, _ = read(recipe_of(mix))
    sources = [row.id.partition("/")[0] for row in rows]
    assert set(sources) == {"scans", "tables"} and sources.count("scans") == 2 * sources.count("tables")
    (stream,) = code("Streaming", "yaml")
    assert recipe_of(stream).data.streaming
    hub = recipe_of("data: {source: hub, name: me/rows, root: tables, val: validation}")
    assert len(read(hub)[0]) == len(read(hub, "val")[0]) == 2


def test_the_tables_of_the_page_are_complete():
    text = (DOCS / PAGE).read_text(encoding="utf-8")
    sources = re.findall(r"^\| `(\w+)` \|", text.partition("## ")[0], re.MULTILINE)
    assert set(sources) == SOURCES.keys()
    table = SECTIONS["Fields of other names"]
    keys = set(re.findall(r"`(\w+)`", "".join(re.findall(r"^\| (`.*?) \|", table, re.MULTILINE))))
    assert keys == {*FIELD_KEYS}


def test_what_the_page_says_of_images_holds():
    from finetune.data.bad_rows import MAX_SHARE
    from finetune.data.images import FORMATS
    from finetune.data.stream import BUFFER, SAMPLE

    text = " ".join((DOCS / PAGE).read_text(encoding="utf-8").split())
    (listed,) = re.findall(r"Formats: (.*?)\. ", text)
    assert {name.replace(" ", "").upper() for name in listed.split(", ")} == {*FORMATS}
    assert f"{ColumnData.model_fields['max_image_pixels'].default:,} pixels" in text
    assert f"first {SAMPLE:,} are checked" in text and f"buffer of {BUFFER:,}" in text
    assert f"At most {MAX_SHARE:.0%}".replace("%", " %") in text
