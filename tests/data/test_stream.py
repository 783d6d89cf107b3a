"""A streamed split: rows by their position, checked at first by a sample and then on arrival, and never all held."""

import io
import json

import pytest
from datasets import ClassLabel, Dataset, Image, IterableDataset
from PIL import Image as PILImage

from finetune.assemble.loading import load_base
from finetune.assemble.rows import examples_of, training_rows
from finetune.data import stream as streams
from finetune.data.fields import RawRow
from finetune.data.images import open_image
from finetune.data.open_stream import open_stream
from finetune.data.splits import tally
from finetune.data.stream_reader import Arrival
from finetune.errors import DataError, RecipeError
from finetune.recipe import HubData, MixData, ParquetData
from finetune.runs.run_folder import rows_digest
from finetune.tasks.vqa import VqaConfig

TASK = VqaConfig()


def png(shade, size=(4, 4)):
    file = io.BytesIO()
    PILImage.new("RGB", size, (shade, 0, 0)).save(file, "PNG")
    return file.getvalue()


def row(number, **changes):
    return {"image": {"bytes": png(number), "path": f"{number}.png"}, "question": "Which?", "answer": f"a{number}"} | (
        changes
    )


def write(rows, path, *, label=False):
    """Write Parquet as the hub has it, two rows a group."""
    path.parent.mkdir(parents=True, exist_ok=True)
    table = Dataset.from_list(rows).cast_column("image", Image())
    if label:
        table = table.add_column("kind", [i % 2 for i in range(len(rows))]).cast_column(
            "kind", ClassLabel(names=["odd", "even"])
        )
    table.to_parquet(path, batch_size=2)


@pytest.fixture(autouse=True)
def small(monkeypatch):
    """A sample of 5, a shuffle among 4, pieces of 2."""
    monkeypatch.setattr(streams, "SAMPLE", 5)
    monkeypatch.setattr(streams, "BUFFER", 4)
    monkeypatch.setattr(streams, "_AT_ONCE", 2)


@pytest.fixture
def root(tmp_path):
    """A folder as the hub lays one out: train 20 rows in two files, validation 3."""
    folder = tmp_path / "set"
    write([row(i) for i in range(14)], folder / "data" / "train-00000-of-00002.parquet")
    write([row(i) for i in range(14, 20)], folder / "data" / "train-00001-of-00002.parquet")
    write([row(i) for i in range(3)], folder / "data" / "validation-00000-of-00001.parquet")
    return folder


def hub(root, **fields):
    return HubData(source="hub", name="demo/set", root=str(root), streaming=True, test=None, **fields)


def opened(section, *, seed=0, logged=None):
    bad = tally(section, "train", log=(logged if logged is not None else []).append)
    return open_stream(section, task=TASK, seed=seed, bad=bad)


def answers(stream, positions):
    reader = stream.reader()
    return [stream.checks.example(reader.at(position)).answers[0] for position in positions]


def test_a_pass_has_each_row_once_and_an_order_of_its_own(root):
    logged = []
    both = answers(opened(hub(root), logged=logged), range(40))
    first, second = both[:20], both[20:]
    assert sorted(first) == sorted(second) == sorted(f"a{i}" for i in range(20))
    assert first != second and first != [f"a{i}" for i in range(20)]
    assert answers(opened(hub(root)), range(40)) == both
    assert answers(opened(hub(root), seed=1), range(20)) != first
    assert logged == [
        "demo/set train is a stream: its first 5 rows were checked, 0 of them left out; the others are checked as they "
        "arrive"
    ]


def test_a_row_depends_on_its_position_and_not_on_where_a_reader_began(root):
    whole = answers(opened(hub(root)), range(65))
    for first in (0, 7, 19, 20, 33, 61):
        assert answers(opened(hub(root)), range(first, 65, 2)) == whole[first::2]
    stream = opened(hub(root))
    answers(stream, [20])  # the length is known from here on, and whole passes are left out
    assert stream.length == 20
    assert next(stream.passes(61))[:3] == (3, 60, 60)
    assert answers(stream, range(61, 65)) == whole[61:]


def test_both_sources_give_the_rows_of_a_list(root):
    section = ParquetData(source="parquet", root=str(root), train="data/train*.parquet", streaming=True)
    assert answers(opened(section), range(20)) == answers(opened(hub(root)), range(20))
    example = opened(section).first[0]
    shade = int(example.answers[0][1:])
    assert open_image(example.images[0]).getpixel((0, 0)) == (shade, 0, 0)
    assert example.meta["image"] and example.meta["question"] == "Which?"


def test_a_label_is_its_name_and_captions_change_with_the_pass(tmp_path):
    rows = [{"image": row(i)["image"], "captions": ["one", "two", "three"]} for i in range(6)]
    write(rows, tmp_path / "train.parquet", label=True)
    stream = opened(
        ParquetData(source="parquet", root=str(tmp_path), default_question="Say.", question_type="kind", streaming=True)
    )
    reader = stream.reader()
    examples = [stream.checks.example(reader.at(position)) for position in range(24)]
    assert {example.question_type for example in examples} == {"odd", "even"}
    assert {example.messages[-1]["content"][0]["text"] for example in examples} == {"one", "two", "three"}


def test_no_more_is_read_than_the_shuffle_needs(monkeypatch):
    """Of a source without end."""
    made = []

    def rows():
        for number in range(10**9):
            made.append(number)
            yield {"question": "Which?", "answer": f"a{number}"}

    section = ParquetData(source="parquet", root=".", image=None, streaming=True)
    checks = streams.Checks(section=section, task=TASK, root=None, seed=0)
    stream = streams.Stream(
        IterableDataset.from_generator(rows), "rows", files=[], checks=checks, bad=tally(section, "train", log=print)
    )
    assert len(made) <= 1 + 5 + 2 * 4 and len(stream.first) == 3
    reader = stream.reader()
    made.clear()
    reader.at(100)
    assert len(made) <= 100 + 2 * 4
    assert reader._table.num_rows <= 2


@pytest.mark.parametrize("where", ["first", "later"])
@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"answer": ""}, "'answer' must be a non-empty text, got ''"),
        ({"image": {"bytes": png(3)[:45], "path": None}}, "not a readable image"),
        ({"image": {"bytes": None, "path": "no.png"}}, "the image .*no.png does not exist"),
        ({"image": {"bytes": png(3, (9, 9)), "path": None}}, "an image must have at most 50 pixels, got 9 x 9"),
    ],
)
def test_a_bad_row_is_an_error_that_shows_it(tmp_path, where, change, reason):
    write([row(i) for i in range(30)], tmp_path / "train.parquet")
    order = answers(opened(ParquetData(source="parquet", root=str(tmp_path), streaming=True)), range(30))
    number = int(order[3 if where == "first" else 12][1:])
    rows = [row(i) for i in range(30)]
    rows[number] |= {"question": "Which is bad?", **change}
    write(rows, tmp_path / "train.parquet")
    section = ParquetData(source="parquet", root=str(tmp_path), streaming=True, max_image_pixels=50)
    fault = rf"(?s)train.*.parquet, row {3 if where == 'first' else 12} of pass 1 .*Which is bad.*{reason}"
    if where == "first":
        with pytest.raises(DataError, match=fault):
            opened(section)
        return
    stream = opened(section)
    stream.receive([(position, None) for position in range(12)])
    found = stream.checks.example(stream.reader().at(12))
    with pytest.raises(DataError, match=fault):
        stream.receive([(12, found)])


def test_a_row_with_another_system_message_than_the_first_ones_is_an_error(tmp_path):
    rows = [row(i, system="Be brief.") for i in range(20)]
    write(rows, tmp_path / "train.parquet")
    section = ParquetData(source="parquet", root=str(tmp_path), streaming=True)
    order = answers(opened(section), range(12))
    rows[int(order[9][1:])]["system"] = "Be long."
    write(rows, tmp_path / "train.parquet")
    stream = opened(section)
    (shape,) = stream.survey.shapes
    assert shape.system == "Be brief."
    stream.keep_prompt(TASK.model_copy(update={"system_prompt": shape.system}))
    reader = stream.reader()
    found = [stream.checks.example(reader.at(position)) for position in range(12)]
    faults = [position for position, one in enumerate(found) if isinstance(one, DataError)]
    assert faults == [9]
    assert "the system message must equal that of the first rows, 'Be brief.', got 'Be long.'" in str(found[9])


def test_rows_that_are_skipped_are_counted_once_and_may_not_be_many(root):
    logged = []
    section = hub(root, on_error="skip")
    stream = opened(section, logged=logged)
    bad = opened(hub(root)).checks.example(
        Arrival(position=9, epoch=0, row=RawRow(id="x", where="row 9", fields={"question": "Q"}))
    )
    for _ in range(2):  # the second time as after memory ran out
        stream.receive([(position, bad if position == 9 else None) for position in range(20)])
    assert (stream.bad.tried, stream.bad.skipped) == (20, 1)
    stream.log_skipped(logged.append)
    assert logged[1].startswith("skipped 1 of 20 train rows (data.on_error: skip)")
    with pytest.raises(DataError, match="(?s)skipped 2 of 21 train rows.*at most 5% of the rows, and these are more"):
        stream.receive([(20, bad)])


def test_rows_that_are_too_long_are_refused_or_dropped(make_recipe, tiny_fast_vlm, tmp_path, monkeypatch):
    base = load_base(str(tiny_fast_vlm), device="cpu")
    rows = [row(i, answer="red " * 30 if i in (2, 25) else "red") for i in range(30)]
    write(rows, tmp_path / "train.parquet")

    def recipe(**data):
        data = {"source": "parquet", "root": str(tmp_path), "streaming": True, "val": None, "test": None, **data}
        made = make_recipe(tiny_fast_vlm)
        return made.model_copy(update={"data": ParquetData(**data), "seed": 1})

    counts = [len(base.collator.supervise(e).ids) for e in examples_of(recipe(streaming=False), "train")]
    limit = sorted(counts)[0] + 20  # room for the image
    monkeypatch.setattr(streams, "SAMPLE", 30)
    with pytest.raises(
        DataError, match=rf"(?s)2 of 30 rows are too long:.*a row must have at most {limit} tokens, got .*too_long=drop"
    ):
        training_rows(recipe(max_length=limit), base=base)
    logged = []
    stream = training_rows(recipe(max_length=limit, too_long="drop"), base=base, log=logged.append)
    assert "its first 30 rows were checked, 2 of them left out" in logged[0]
    stream.log_skipped(logged.append)
    assert "2 of 30 rows are too long" in logged[1] and "too_long: drop" in logged[1]
    with pytest.raises(DataError, match=r"(?s)30 of 30 rows are too long.*and 10 more.*No row is left"):
        training_rows(recipe(max_length=3, too_long="drop"), base=base)
    monkeypatch.setattr(streams, "SAMPLE", 1)
    stream = training_rows(recipe(max_length=limit), base=base)
    reader = stream.reader()
    with pytest.raises(DataError, match=rf"a row must have at most {limit} tokens, got \d+. A row is never cut"):
        for position in range(30):
            found = stream.checks.example(reader.at(position))
            stream.receive([(position, found if isinstance(found, DataError) else None)])


def test_validation_brings_only_its_own_split(make_recipe, root, tmp_path):
    made = make_recipe("base").model_copy(update={"data": hub(root)})
    assert [e.answers[0] for e in examples_of(made, "val")] == ["a0", "a1", "a2"]
    kept = list((tmp_path / "cache").rglob("*.arrow"))
    assert len(kept) == 1
    before = kept[0].stat().st_mtime_ns
    assert len(examples_of(made, "val")) == 3
    assert [path.stat().st_mtime_ns for path in (tmp_path / "cache").rglob("*.arrow")] == [before]
    write([row(i) for i in range(4)], root / "data" / "validation-00000-of-00001.parquet")
    assert len(examples_of(made, "val")) == 4, "the file changed"


def test_what_is_known_of_a_stream_is_its_files_and_its_order(root):
    digest = rows_digest(opened(hub(root)))
    assert rows_digest(opened(hub(root))) == digest != rows_digest(opened(hub(root), seed=1))
    names = [name for name, *_ in opened(hub(root)).identity["files"]]
    assert names == ["train-00000-of-00002.parquet", "train-00001-of-00002.parquet"]
    write([row(i) for i in range(14)], root / "data" / "train-00000-of-00002.parquet")
    assert rows_digest(opened(hub(root))) != digest
    assert str(root) not in json.dumps(opened(hub(root)).identity)


def test_what_cannot_be_streamed_is_refused_with_the_reason(root, tmp_path):
    with pytest.raises(DataError, match=r"Bad split: train\[:50%\].*Check data.train"):
        opened(hub(root, train="train[:50%]"))
    with pytest.raises(DataError, match="data.answer must name a column, got 'label'"):
        opened(hub(root, answer="label"))
    (tmp_path / "train.parquet").write_bytes(b"no parquet")
    with pytest.raises(DataError, match="train.*parquet: not readable Parquet files"):
        opened(ParquetData(source="parquet", root=str(tmp_path), streaming=True))
    write([row(i) for i in range(30)], tmp_path / "train.parquet")
    stream = opened(ParquetData(source="parquet", root=str(tmp_path), streaming=True))
    (tmp_path / "train.parquet").write_bytes((tmp_path / "train.parquet").read_bytes()[:500])
    with pytest.raises(
        DataError, match=r"train\*.parquet: the stream must be readable to its end, but reading failed at row 0"
    ):
        stream.reader().at(0)
    with pytest.raises(DataError, match="must be a folder with the files of .*missing, which is no folder"):
        opened(hub(tmp_path / "missing"))


STREAM = {"source": "parquet", "streaming": True}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"data": STREAM, "train": {"max_steps": None, "epochs": 1.0}},
            "data.streaming needs train.max_steps, got train.epochs .*Set train.max_steps",
        ),
        ({"data": STREAM | {"max_rows": {"train": 9}}}, "max_rows.train cannot be used with streaming, got 9"),
        ({"data": {"source": "saved", "streaming": True}}, "data.streaming: unknown key"),
    ],
)
def test_a_recipe_that_cannot_stream_is_refused(make_recipe, changes, message):
    with pytest.raises(RecipeError, match=message):
        make_recipe("base", **changes)


def test_a_mix_does_not_stream():
    with pytest.raises(ValueError, match="sources.one must not be a stream"):
        MixData.model_validate({"source": "mix", "sources": {"one": {"data": STREAM | {"root": "."}}}})


def test_a_list_is_read_where_nothing_streams(root, make_recipe):
    made = make_recipe("base").model_copy(update={"data": hub(root).model_copy(update={"streaming": False})})
    assert len(training_rows(made)) == 20
