"""Every source gives the same rows: JSON Lines, Parquet, a saved folder, a data set of the hub, and mixes of them."""

import json
import pickle
import shutil

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from datasets import Dataset, DatasetDict, Features, Image, List, Value
from PIL import Image as PILImage
from torch.utils.data import DataLoader

from finetune.assemble.rows import examples_of
from finetune.data.images import as_source, image_digest, open_image
from finetune.data.mix import shares
from finetune.data.stored_images import StoredImage
from finetune.errors import DataError, RecipeError, RowError
from finetune.recipe import HubData, JsonlData, MixData, ParquetData, SavedData, parse_recipe
from tests.data.conftest import read_rows as read

SIZES = [(4 + i, 3) for i in range(6)]


def table(*, rows=6, **more):
    """A table as `datasets` writes it: images embedded as {bytes, path}."""
    images = [PILImage.fromarray(np.full((h, w, 3), 10 * i, np.uint8)) for i, (w, h) in enumerate(SIZES[:rows])]
    columns = {"image": images, "question": ["What?"] * rows, "answer": [f"a{i}" for i in range(rows)], **more}
    return Dataset.from_dict(columns).cast_column("image", Image())


def embedded(dataset, path):
    """Write Parquet as `push_to_hub` does, with the images' bytes inside."""
    path.parent.mkdir(parents=True, exist_ok=True)
    dataset.to_parquet(path)


@pytest.fixture
def jsonl(tmp_path):
    folder = tmp_path / "jsonl"
    folder.mkdir()
    rows = []
    for i, row in enumerate(table()):
        row["image"].save(folder / f"{i}.png")
        rows.append({**row, "image": f"{i}.png"})
    (folder / "train.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return JsonlData(source="jsonl", root=str(folder))


@pytest.fixture
def parquet(tmp_path):
    folder = tmp_path / "parquet"
    embedded(table().select(range(4)), folder / "train-00000-of-00002.parquet")
    embedded(table().select([4, 5]), folder / "train-00001-of-00002.parquet")
    return ParquetData(source="parquet", root=str(folder))


@pytest.fixture
def saved(tmp_path):
    DatasetDict({"train": table(), "validation": table().select([1, 3])}).save_to_disk(tmp_path / "saved")
    return SavedData(source="saved", root=str(tmp_path / "saved"))


@pytest.fixture
def hub(tmp_path):
    embedded(table(), tmp_path / "hub" / "data" / "train-00000-of-00001.parquet")
    return HubData(source="hub", name="some/set", root=str(tmp_path / "hub"))


@pytest.mark.parametrize("source", ["jsonl", "parquet", "saved", "hub"])
def test_every_source_gives_the_same_rows(source, request):
    examples = read(request.getfixturevalue(source))
    assert [e.answers for e in examples] == [[f"a{i}"] for i in range(6)]
    assert [e.meta["question"] for e in examples] == ["What?"] * 6 and len({e.id for e in examples}) == 6
    for i, example in enumerate(examples):
        (stored,) = example.images
        image = open_image(stored)
        assert image.size == SIZES[i] and image.getpixel((0, 0)) == (10 * i,) * 3
        assert len(pickle.dumps(example)) < 20_000, "an image stays where it is"


def test_ids_name_the_place_of_a_row(jsonl, parquet, saved, hub):
    assert [read(s)[5].id for s in (jsonl, saved, hub)] == ["train.jsonl:6", "train:5", "train:5"]
    names = [e.id for e in read(parquet)]
    assert names[3:5] == ["train-00000-of-00002.parquet:3", "train-00001-of-00002.parquet:0"]
    assert str(read(parquet)[4].images[0]).endswith("train-00001-of-00002.parquet, row 0, image")


def test_splits_of_a_saved_folder(saved, tmp_path):
    assert [e.answers[0] for e in read(saved, "val")] == ["a1", "a3"]
    with pytest.raises(
        DataError,
        match=r"test: the folder must hold a data set that datasets saved, .*: train, validation. Set data.test",
    ):
        read(saved, "test")
    table().save_to_disk(tmp_path / "single")
    single = SavedData(source="saved", root=str(tmp_path / "single"), train=".", val=None, test=None)
    assert len(read(single)) == 6 and read(single, "val") == []


def test_an_image_is_pickled_by_its_place_and_opened_once(parquet):
    image = read(parquet)[5].images[0]
    assert isinstance(image, StoredImage) and image == pickle.loads(pickle.dumps(image))
    assert pickle.loads(pickle.dumps(image)).table is image.table
    assert image_digest(image) == image_digest(image.read()) and as_source(image) is image


def first_pixels(rows):
    return [open_image(row.images[0]).getpixel((0, 0))[0] for row in rows]


@pytest.mark.parametrize("start", ["fork", pytest.param("spawn", marks=pytest.mark.slow)])
@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")
def test_workers_open_images(parquet, start):
    loader = DataLoader(
        read(parquet), batch_size=2, num_workers=1, collate_fn=first_pixels, multiprocessing_context=start
    )
    assert [pixel for batch in loader for pixel in batch] == [0, 10, 20, 30, 40, 50]


def test_rows_about_one_image_are_logged(tmp_path):
    """Its pixels are stored with each question about it; scores are drawn by image."""
    same = table().select([0, 0, 1])
    embedded(same, tmp_path / "train.parquet")
    one, two, three = (e.meta["image"] for e in read(ParquetData(source="parquet", root=str(tmp_path))))
    assert one == two != three


def test_slices_of_one_split_are_different_rows(hub):
    halves = hub.model_copy(update={"train": "train[:50%]", "val": "train[50%:]"})
    assert [e.answers[0] for e in read(halves)] == ["a0", "a1", "a2"]
    val = read(halves, "val")
    assert [e.answers[0] for e in val] == ["a3", "a4", "a5"]
    assert [open_image(e.images[0]).size for e in val] == SIZES[3:]
    assert val[0].images[0].key() != read(halves)[0].images[0].key(), "or the sizes of one would be those of the other"


def test_several_images_and_conversations_in_a_table(tmp_path):
    turns = [
        {"role": "user", "content": [{"type": "image", "text": None}, {"type": "text", "text": "What?"}]},
        {"role": "assistant", "content": [{"type": "text", "text": "This."}]},
    ]
    two = json.loads(json.dumps(turns))
    two[0]["content"].insert(0, {"type": "image", "text": None})
    none = [{"role": "user", "content": [{"type": "text", "text": "Hi"}]}, turns[1]]
    images = [{"bytes": p.tobytes(), "path": None} for p in ()]
    files = []
    for i, color in enumerate(("red", "lime", "blue")):
        PILImage.new("RGB", (2, 2), color).save(tmp_path / f"{i}.png")
        files.append({"bytes": (tmp_path / f"{i}.png").read_bytes(), "path": f"{i}.png"})
    columns = {"messages": [turns, two, none], "images": [files[:1], files[1:], images]}
    part = {"type": Value("string"), "text": Value("string")}
    features = Features({"messages": List({"role": Value("string"), "content": List(part)}), "images": List(Image())})
    Dataset.from_dict(columns, features=features).to_parquet(tmp_path / "train.parquet")
    examples = read(ParquetData(source="parquet", root=str(tmp_path)))
    assert [len(e.images) for e in examples] == [1, 2, 0]
    assert [open_image(image).getpixel((0, 0)) for image in examples[1].images] == [(0, 255, 0), (0, 0, 255)]
    assert examples[0].messages[0]["content"] == [{"type": "image"}, {"type": "text", "text": "What?"}]


def test_labels_paths_and_bytes(tmp_path):
    from datasets import ClassLabel

    PILImage.new("RGB", (3, 2), "red").save(tmp_path / "a.png")
    label = ClassLabel(names=["cat", "dog"])
    columns = {"image": ["a.png"] * 2, "answer": [1, 0]}
    Dataset.from_dict(columns, Features({"image": Value("string"), "answer": label})).to_parquet(
        tmp_path / "train.parquet"
    )
    section = ParquetData(source="parquet", root=str(tmp_path), default_question="Which animal?")
    examples = read(section)
    assert [e.answers for e in examples] == [["dog"], ["cat"]] and examples[0].images == [tmp_path / "a.png"]
    raw = {"image": [(tmp_path / "a.png").read_bytes()], "answer": ["x"]}
    Dataset.from_dict(raw, Features({"image": Value("binary"), "answer": Value("string")})).to_parquet(
        tmp_path / "train.parquet"
    )
    assert open_image(read(section)[0].images[0]).size == (3, 2)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (
            {"answer": "anwser"},
            r"data.answer must name a column, got 'anwser'. Did you mean 'answer'\? The columns are ",
        ),
        ({"image": "photo"}, "data.image must name a column, got 'photo'. The columns are image, question, answer"),
        ({"question_type": "type"}, "data.question_type must name a column, got 'type'"),
        ({"id": "qid"}, "data.id must name a column, got 'qid'"),
    ],
)  # fmt: skip
@pytest.mark.parametrize("source", ["parquet", "saved", "hub"])
def test_a_wrong_column_yields_the_columns(source, fields, message, request):
    section = request.getfixturevalue(source)
    with pytest.raises(DataError, match=message):
        read(type(section)(**section.model_dump(exclude_unset=True), **fields))


@pytest.mark.parametrize(
    ("drop", "message"),
    [
        (
            "answer",
            "must have a column to supervise, got none of .*. The columns are image, question. .*data.answer=COLUMN",
        ),
        (
            "question",
            "must have the question column 'question', got none. The columns are image, answer.*data.default_question",
        ),
        ("image", "must have the image column 'image', got none. The columns are question, answer.*data.image=null"),
    ],
)
def test_a_column_that_is_needed(tmp_path, drop, message):
    table().remove_columns([drop]).to_parquet(tmp_path / "train.parquet")
    with pytest.raises(DataError, match=message):
        read(ParquetData(source="parquet", root=str(tmp_path)))


@pytest.mark.parametrize(
    ("cell", "message"),
    [
        ({"bytes": None, "path": None}, "row 0, image: an image must have bytes or a path, got neither"),
        ({"bytes": b"x", "path": None}, "row 0, image: not a readable image"),
        ({"bytes": None, "path": "no.png"}, "row 0, image: no such file"),
    ],
)
def test_bad_cells_are_bad_rows(tmp_path, cell, message):
    kind = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    columns = {"image": pa.array([cell], kind), "question": ["?"], "answer": ["x"]}
    pq.write_table(pa.table(columns), tmp_path / "train.parquet")
    with pytest.raises(RowError, match=f"train.parquet, {message}"):
        read(ParquetData(source="parquet", root=str(tmp_path)))


def test_files_that_are_no_tables(tmp_path, saved, hub):
    section = ParquetData(source="parquet", root=str(tmp_path / "p"))
    with pytest.raises(
        DataError, match="data.train must match at least one file, got train.*Parquet files there: none"
    ):
        read(section)
    (tmp_path / "p").mkdir()
    (tmp_path / "p" / "train.parquet").write_bytes(b"PAR1")
    with pytest.raises(DataError, match=r"train.parquet: not a readable Parquet file"):
        read(section)
    embedded(table(), tmp_path / "p" / "train.parquet")
    Dataset.from_dict({"other": [1]}).to_parquet(tmp_path / "p" / "train2.parquet")
    with pytest.raises(DataError, match="must be readable Parquet files with the same columns"):
        read(section)
    embedded(table().select([]), tmp_path / "p" / "none.parquet")
    with pytest.raises(DataError, match="must have at least one row, got none"):
        read(ParquetData(source="parquet", root=str(tmp_path / "p"), train="none.parquet"))
    shutil.rmtree(tmp_path / "saved" / "train")
    with pytest.raises(DataError, match="saved/train: the folder must hold a data set that datasets saved"):
        read(saved)
    with pytest.raises(DataError, match=r"cannot be loaded: .*Check data.val=validation"):
        read(hub, "val")


def test_offline_the_error_names_the_download(monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", True)
    section = HubData(source="hub", name="flaviagiammarino/vqa-rad", revision="main")
    with pytest.raises(DataError) as caught:
        read(section)
    message = str(caught.value)
    assert "hf download flaviagiammarino/vqa-rad --repo-type dataset --revision main --local-dir FOLDER" in message
    assert "data.root=FOLDER" in message
    with pytest.raises(
        DataError, match="data.root must be a folder with the files of a/b, got .*nowhere, which is no folder"
    ):
        read(HubData(source="hub", name="a/b", root="nowhere"))


def mix(jsonl, parquet, *, weight=1):
    parts = {"lines": {"data": jsonl}, "table": {"weight": weight, "data": parquet}}
    return MixData(source="mix", sources=parts)


def test_shares_follow_the_weights_and_no_row_is_left_out():
    assert shares({"a": 100, "b": 100}, {"a": 2, "b": 1}) == {"a": 200, "b": 100}
    assert shares({"a": 10, "b": 100}, {"a": 1, "b": 1}) == {"a": 100, "b": 100}
    assert shares({"a": 10, "b": 100}, {"a": 1, "b": 10}) == {"a": 10, "b": 100}
    assert shares({"a": 3, "b": 0}, {"a": 1, "b": 5}) == {"a": 3, "b": 0}
    assert shares({"a": 7, "b": 5}, {"a": 1, "b": 0.5}) == {"a": 10, "b": 5}


def test_a_mix_repeats_what_weighs_more(jsonl, parquet):
    examples = read(mix(jsonl, parquet, weight=2.5))
    ids = [e.id for e in examples]
    assert len(set(ids)) == len(ids) == 6 + 15
    assert ids[0] == "lines/train.jsonl:1" and ids[6] == "table/train-00000-of-00002.parquet:0"
    repeated = [i for i in ids if "#" in i]
    assert sum(i.endswith("#2") for i in repeated) == 6 and sum(i.endswith("#3") for i in repeated) == 3
    assert {e.question_type for e in examples} == {"lines/What?", "table/What?"}
    assert ids == [e.id for e in read(mix(jsonl, parquet, weight=2.5))]
    assert ids != [e.id for e in read(mix(jsonl, parquet, weight=2.5), seed=1)]


def test_a_mix_evaluates_every_row_once(saved, tmp_path):
    section = MixData(source="mix", sources={"a": {"weight": 3, "data": saved}, "b": {"data": saved}})
    assert [e.id for e in read(section, "val")] == [
        "a/validation:0",
        "a/validation:1",
        "b/validation:0",
        "b/validation:1",
    ]


def test_a_mix_logs_once_what_holds_for_all(jsonl, parquet, tmp_path):
    path = tmp_path / "jsonl" / "train.jsonl"
    path.write_text(path.read_text() + "\n{")
    section = mix(jsonl, parquet)
    with pytest.raises(RowError, match="train.jsonl, line 7: a row must be one JSON object .* not JSON"):
        read(section)
    with pytest.raises(DataError, match="skipped 1 of 7 lines train rows"):
        read(section.model_copy(update={"on_error": "skip"}))


def raw(data):
    return {
        "name": "x", "domain": "d", "model": {"name_or_path": "pocket"}, "method": {"name": "lora"},
        "train": {"max_steps": 1}, "data": data,
    }  # fmt: skip


@pytest.mark.parametrize(
    ("part", "message"),
    [
        (
            {"source": "jsonl", "root": "a", "on_error": "skip"},
            "sources.one must not set on_error: one value holds for the whole mix. Set data.on_error",
        ),
        ({"source": "jsonl", "rot": "a"}, r"data.sources.one.data.rot: unknown key. Did you mean 'root'\?"),
        ({"source": "mix", "sources": {}}, "data.sources.one.data"),
    ],
)
def test_a_mix_in_a_recipe(part, message):
    with pytest.raises(RecipeError, match=message):
        parse_recipe(raw({"source": "mix", "sources": {"one": {"data": part}}}), source="r")


def test_a_recipe_does_not_depend_on_where_a_mix_lies(jsonl, parquet):
    def recipe(root):
        part = {"data": {"source": "jsonl", "root": root}, "weight": 2}
        return parse_recipe(raw({"source": "mix", "sources": {"one": part}}), source="r")

    assert recipe("a").identity() == recipe("b").identity() and not recipe("a").data.synthetic
    drawn = {"data": {"source": "procedural", "name": "medical", "rows": {"train": 2}}}
    synthetic = parse_recipe(raw({"source": "mix", "sources": {"one": drawn}}), source="r")
    assert synthetic.data.synthetic and examples_of(synthetic, "train")[0].id == "one/medical:train:0:0"
