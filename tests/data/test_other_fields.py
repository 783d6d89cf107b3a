"""What a row says beside its question and answer is honoured or refused, never dropped, whatever the source."""

import json
from dataclasses import replace

import pytest
from datasets import Dataset

from finetune.assemble.loading import load_base
from finetune.core.example import text_of
from finetune.data.open_stream import open_stream
from finetune.data.splits import tally
from finetune.errors import DataError, RecipeError, RowError
from finetune.recipe import HubData, JsonlData, ParquetData, SavedData, parse_recipe
from finetune.runs.saving import data_digest
from finetune.runs.train import train
from finetune.tasks.contrastive import ContrastiveConfig
from finetune.tasks.vqa import VqaConfig
from tests.data.conftest import ROW, TASK, read_rows

IMAGE, TEXT = {"type": "image"}, {"type": "text", "text": "What?"}


def user(*parts, **keys):
    return {"role": "user", "content": list(parts) or [TEXT], **keys}


def assistant(text="x", **keys):
    return {"role": "assistant", "content": text, **keys}


def talk(*messages, **fields):
    return {"messages": list(messages), **fields}


@pytest.mark.parametrize("off", [{"weight": 0}, {"weight": 0.0}, {"loss": False}, {"train": False}, {"loss": 0}])
def test_a_turn_of_weight_0_is_not_supervised(read, off):
    both, second, first = read(
        talk(user(), assistant("one", weight=1, loss=None), user(), assistant("two", loss=True)),
        talk(user(), assistant("one", **off), user(), assistant("two")),
        talk(user(), assistant("one", train=True), user(), assistant("two", **off)),
        image=None,
    )
    assert [row.unsupervised for row in (both, second, first)] == [frozenset(), {0}, {1}]
    assert [row.answers for row in (both, second, first)] == [["two"]] * 3, "the last turn is the one evaluated"
    assert len({data_digest([row]) for row in (both, second, first)}) == 3
    with pytest.raises(
        RowError,
        match="line 1: a row must have a supervised turn, but every assistant turn has weight 0.*Leave the row out",
    ):
        read(talk(user(), assistant(**off)), image=None)
    with pytest.raises(
        RowError, match="line 1: .* but the last assistant turn, the only one that is supervised, has weight 0"
    ):
        read(talk(user(), assistant("one"), user(), assistant("two", **off)), image=None, supervise="last")
    assert len(read(talk(user(), assistant("one", **off), user(), assistant("two")), image=None, supervise="last")) == 1


@pytest.mark.parametrize("supervise", ["all", "last"])
def test_the_labels_leave_out_a_turn_of_weight_0(read, tiny_fast_vlm, supervise):
    turns = (user(), assistant("one", weight=0), user(), assistant("two"), user(), assistant("three"))
    (row,) = read(talk(*turns), image=None, supervise=supervise)
    data = JsonlData(source="jsonl", root="", supervise=supervise)
    base = load_base(str(tiny_fast_vlm), device="cpu", data=data)
    shown = base.collator.show(row)
    supervised = [part.split("⟧")[0] for part in shown.split("⟦")[1:]]
    assert supervised == [" two<|end|>", " three<|end|>"][1 if supervise == "last" else 0 :]
    # The same texts without the weight are another row.
    assert base.collator.show(replace(row, unsupervised=frozenset())).count("⟦") == (1 if supervise == "last" else 3)


@pytest.mark.parametrize(
    ("message", "fault"),
    [
        (assistant(weight=0.5), "message 2: weight must be 0 or 1, got 0.5"),
        (assistant(weight=True), "weight must be 0 or 1, got True"),
        (assistant(weight="0"), "weight must be 0 or 1, got '0'"),
        (assistant(loss="no"), "loss must be true or false, got 'no'"),
        (assistant(train=2), "train must be true or false, got 2"),
        (assistant(train=[]), r"train must be true or false, got \[\]"),
        (assistant(weight=0, train=True), "message 2: weight and train must agree, got weight=0 and train=True"),
        (assistant(tool_calls=[{"id": "1"}]), "'tool_calls' is not supported, got .*: tools are not rendered"),
        (assistant(reasoning_content="Hm."), "'reasoning_content' is not supported"),
    ],
)
def test_no_field_of_a_message_is_dropped_silently(read, message, fault):
    with pytest.raises(RowError, match=fault):
        read(talk(user(), message), image=None)


@pytest.mark.parametrize(
    ("message", "fault"),
    [
        (
            user(IMAGE, TEXT, loss=True),
            "message 1: only assistant turns can be supervised, got loss set on a turn of the role user",
        ),
        (
            user({"type": "image", "min_pixels": 9}, TEXT),
            "'min_pixels' is not supported, got 9: the processor of the base sets",
        ),
        (
            user({**TEXT, "image": "good.png"}),
            "'image' is not supported, got 'good.png': a part must be a text or an image",
        ),
        (user({**IMAGE, "text": "What?"}), "'text' is not supported, got 'What.': a part must be a text or an image"),
        (user({**IMAGE, "image": "good.png", "index": 0}, TEXT), "must name its image or give its index, got both"),
        (user({**IMAGE, "index": 1}, TEXT), "must name each image of the row once, from 0 to 0, got .1."),
        (user({**IMAGE, "index": True}, TEXT), "must name each image of the row once"),
    ],
)
def test_no_field_of_a_user_message_is_dropped_silently(read, message, fault):
    with pytest.raises(RowError, match=fault):
        read(talk(message, assistant(), image="good.png"))


def test_empty_keys_are_as_if_absent(read):
    """As a table has all columns in all rows, and others write empty texts and lists."""
    empty = {"tool_calls": [], "weight": None, "name": None}
    parts = ({**IMAGE, "text": "", "index": None}, {**TEXT, "image": None, "index": None})
    row = talk(user(*parts, **empty), assistant(**empty), image="good.png", history=[], system="", input="", tools=None)
    assert read(row) == read(talk(user(IMAGE, TEXT), assistant(), image="good.png"))


def test_index_names_the_image_of_a_part(read, folder):
    (folder / "two.png").write_bytes((folder / "good.png").read_bytes())
    images = ["good.png", "two.png"]
    (row,) = read(talk(user({**IMAGE, "index": 1}, TEXT, {**IMAGE, "index": 0}), assistant(), images=images))
    assert [source.name for source in row.images] == ["two.png", "good.png"]
    for indices in ([0, 0], [0, 2], [0, None], [-1, 0]):
        parts = [{**IMAGE, "index": index} for index in indices]
        with pytest.raises(RowError, match="the index of 2 image parts must name each image of the row once"):
            read(talk(user(*parts, TEXT), assistant(), images=images))


def test_system_is_the_system_message_of_its_row(read):
    task = VqaConfig(system_prompt="All.")
    rows = [{**ROW, "system": "Mine."}, ROW, talk(user(), assistant(), system="Mine."), talk(user(), assistant())]
    found = read(*rows, task=task)
    assert [text_of(row.messages[0]) for row in found] == ["Mine.", "All.", "Mine.", "All."]
    assert [[m["role"] for m in row.messages] for row in found] == [["system", "user", "assistant"]] * 4
    twice = talk({"role": "system", "content": "a"}, user(), assistant(), system="b")
    with pytest.raises(
        RowError,
        match="line 1: a row must have at most one system message, got one in the messages and one under 'system'",
    ):
        read(twice)
    assert read(twice, system=None)[0].messages[0]["content"][0]["text"] == "a"
    with pytest.raises(RowError, match="'system' must be a non-empty text"):
        read({**ROW, "system": 3})
    with pytest.raises(RowError, match="must be null for this task, whose texts have no system message"):
        read({**ROW, "system": "x"}, task=ContrastiveConfig(name="contrastive"))


REFUSED = {
    "history": [["What?", "x"]],
    "conversations": [{"from": "human", "value": "?"}],
    "instruction": "Look.",
    "input": "more",
    "tools": "[{}]",
    "videos": ["a.mp4"],
    "rejected": "y",
    "chosen": "x",
    "weight": 0,
    "loss": False,
    "train": False,
}


@pytest.mark.parametrize("field", REFUSED)
def test_a_field_that_changes_the_row_is_refused(read, field):
    row = {**ROW, field: REFUSED[field]}
    with pytest.raises(RowError, match=rf"line 2: the field '{field}' is not supported, got .*data.ignore=\[{field}\]"):
        read(ROW, row)
    assert read(row, ignore=[field]) == read(ROW)
    logged = []
    assert len(read(*[ROW] * 25, row, on_error="skip", logged=logged)) == 25
    assert "unsupported field: 1" in logged[0]


def test_a_row_of_weight_1_and_a_field_that_the_recipe_names(read):
    assert read({**ROW, "weight": 1, "train": True, "loss": 1.0}) == read(ROW)
    row = {"image": "good.png", "instruction": "What?", "chosen": "x"}
    assert read(row, question="instruction", answer="chosen")[0].answers == ["x"]


def test_fields_that_are_not_read_are_listed_once(read):
    logged = []
    read({**ROW, "source": "a", "page": 3}, {**ROW, "source": "b", "page": None}, ROW, logged=logged)
    assert logged == [
        "train rows: fields that are not read: 'source' (2 rows), 'page' (1 rows). They change nothing. To read a "
        "field, name it under data; to remove it from this list, add it to data.ignore."
    ]
    logged = []
    read({**ROW, "source": "a"}, ignore=["source"], logged=logged)
    assert logged == []


def test_a_recipe_cannot_ignore_what_it_reads(make_recipe, tiny_fast_vlm):
    with pytest.raises(
        RecipeError,
        match="ignore must not list 'system', because data.system reads this field. Set data.system to null",
    ):
        make_recipe(tiny_fast_vlm, data={"ignore": ["system"]})
    raw = make_recipe(tiny_fast_vlm).model_dump(mode="json", exclude_none=True)
    assert parse_recipe({**raw, "data": {**raw["data"], "system": None, "ignore": ["system"]}}, source="x")


ROWS = [
    {"question": "What?", "answer": "a", "system": "Mine.", "history": None, "weight": 1, "source": "s"},
    {"question": "What?", "answer": "b", "system": None, "history": [], "weight": None, "source": "s"},
]
ONE, TWO = ([{"type": "text", "text": text}] for text in ("one", "two"))
TALK = [
    {
        "messages": [user(weight=None), assistant(ONE, weight=0), user(weight=None), assistant(TWO, weight=1)],
        "system": "Mine.",
    }
]


def tables(tmp_path, rows):
    """Yield a section for each source that selects columns."""
    table = Dataset.from_list(rows)
    (tmp_path / "p").mkdir()
    table.to_parquet(tmp_path / "p" / "train.parquet")
    table.save_to_disk(tmp_path / "saved" / "train")
    yield ParquetData, {"source": "parquet", "root": str(tmp_path / "p")}
    yield SavedData, {"source": "saved", "root": str(tmp_path / "saved")}
    yield HubData, {"source": "hub", "name": "a/b", "root": str(tmp_path / "p")}
    yield ParquetData, {"source": "parquet", "root": str(tmp_path / "p"), "streaming": True}
    yield HubData, {"source": "hub", "name": "a/b", "root": str(tmp_path / "p"), "streaming": True}


def rows_of(section, logged):
    if getattr(section, "streaming", False):
        bad = tally(section, "train", log=logged.append)
        found = open_stream(section, task=TASK, seed=0, bad=bad).first
        return sorted(found, key=lambda row: row.answers)
    return read_rows(section, logged=logged)


def test_tables_are_read_as_lines_are(tmp_path):
    for kind, fields in tables(tmp_path, ROWS):
        logged = []
        found = rows_of(kind(image=None, **fields), logged)
        assert [[m["role"] for m in row.messages][0] for row in found] == ["system", "user"]
        assert "fields that are not read: 'source'" in logged[0] and "history" not in logged[0]
        logged = []
        assert len(rows_of(kind(image=None, ignore=["source"], **fields), logged)) == 2
        assert not [text for text in logged if "not read" in text]
        with pytest.raises(DataError, match="data.ignore must name columns, got 'sources'. Did you mean 'source'"):
            rows_of(kind(image=None, ignore=["sources"], **fields), logged)


def test_turns_of_tables_are_honoured(tmp_path):
    for kind, fields in tables(tmp_path, TALK):
        (row,) = rows_of(kind(image=None, **fields), [])
        assert row.unsupervised == {0} and text_of(row.messages[0]) == "Mine."


@pytest.mark.parametrize("field", ["history", "videos", "rejected", "weight", "media"])
def test_a_column_that_changes_a_row_is_refused(tmp_path, field):
    value = {"history": [["a", "b"]], "videos": [{"bytes": b"x", "path": None}], "rejected": "no", "weight": 0}
    name = "video" if field == "media" else field
    values = [None, value.get(field, {"bytes": b"x", "path": "a.mp4"})]
    rows = [{**row, "history": None, "weight": None, name: values[i]} for i, row in enumerate(ROWS)]
    for kind, fields in tables(tmp_path, rows):
        with pytest.raises(RowError, match=f"row 1.*the field '{name}' is not supported"):
            rows_of(kind(image=None, **fields), [])
        assert len(rows_of(kind(image=None, ignore=[name], **fields), [])) == 2


def test_rows_are_json():
    assert json.dumps(REFUSED)


@pytest.mark.parametrize("which", ["a system message", "a last turn that is not supervised"])
def test_an_app_asks_as_such_rows_are_trained(tiny_fast_vlm, make_recipe, rows_folder, which):
    """Before training and after saving, a row of every shape is put through an app's own path."""
    path = rows_folder / "train.jsonl"
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    for row in rows[::2]:
        if which == "a system message":
            row["system"] = "Be brief."
        else:
            parts = user(IMAGE, TEXT)
            row["messages"] = [parts, assistant("red"), user(), assistant(row.pop("answer"), weight=0)]
            del row["question"]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    task = {"system_prompt": "", "max_new_tokens": 2}
    result = train(make_recipe(tiny_fast_vlm, task=task, train={"max_steps": 1}, adapter={"publish": None}))
    assert (result.adapter / "manifest.json").is_file()
