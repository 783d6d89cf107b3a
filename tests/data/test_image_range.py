"""Images of more than 8 bits are scaled by one range for the whole data set, which travels with the adapter."""

import json

import numpy as np
import pytest
from datasets import Dataset
from datasets import Image as ImageFeature
from PIL import Image

from finetune.adapters.folder import read_folder
from finetune.adapters.manifest import ImageSpec
from finetune.assemble.loading import load_base
from finetune.assemble.rows import examples_of, training_rows, with_image_range
from finetune.core.example import ImageOptions
from finetune.data.images import open_image, read_pixels
from finetune.errors import DataError, RecipeError, RowError
from finetune.evaluation.compare import evaluate
from finetune.recipe import MixData, ParquetData
from finetune.registry import AdapterRegistry
from finetune.runs.train import train
from finetune.serving.vision_language_model import VisionLanguageModel
from finetune.training.feature_store import source_key
from tests.data.conftest import ROW, read_rows


def deep(values, path, kind=np.uint16):
    """Save a grey image of these values, 40 x 32."""
    pixels = np.resize(np.array(values, kind), (40, 32))
    Image.fromarray(pixels).save(path)
    return path


def pages(path, count=2):
    images = [Image.fromarray(np.full((8, 8), 50 * (n + 1), np.uint8)) for n in range(count)]
    images[0].save(path, save_all=True, append_images=images[1:])
    return path


def greys(image):
    return sorted(set(np.asarray(image)[..., 0].ravel().tolist()))


@pytest.mark.parametrize("suffix", ["png", "tiff"])
@pytest.mark.parametrize(
    ("values", "image_range", "expected"),
    [
        ([0, 4095], (0, 4095), [0, 255]),
        ([0, 2048, 4095], (0, 4095), [0, 128, 255]),
        ([0, 4095], (0, 65535), [0, 16]),
        ([100, 300, 500, 900], (300, 500), [0, 255]),
        ([0, 1023], None, [0, 255]),
        ([0, 1024], None, [0, 64]),  # in 12 bit
        ([0, 16383], None, [0, 255]),
        ([0, 16384], None, [0, 64]),  # in 16 bit
        ([0, 9], None, [0, 2]),  # in 10 bit: never stretched
    ],
)
def test_values_are_scaled_from_the_range(tmp_path, suffix, values, image_range, expected):
    path = deep(values, tmp_path / f"x.{suffix}")
    assert greys(open_image(path, options=ImageOptions(range=image_range))) == expected


def test_a_range_concerns_no_image_of_8_bits(tmp_path):
    Image.fromarray(np.full((4, 4), 200, np.uint8)).save(tmp_path / "x.png")
    assert greys(open_image(tmp_path / "x.png", options=ImageOptions(range=(0, 4095)))) == [200]


def test_values_that_no_bit_depth_holds_need_a_range(tmp_path):
    signed = deep([-1000, 3000], tmp_path / "x.tiff", np.int32)
    with pytest.raises(RowError, match=r"got values from -1000 to 3000.*data.image_range=\[LOW, HIGH\]"):
        open_image(signed)
    assert greys(open_image(signed, options=ImageOptions(range=(-1000, 3000)))) == [0, 255]


@pytest.fixture
def deep_folder(folder):
    """Train rows with 12-bit values, test rows with lower and higher ones."""
    rows = {"train": [[0, 900], [0, 3000]], "val": [[0, 100]], "test": [[0, 500], [0, 5000]]}
    for split, values in rows.items():
        lines = []
        for number, some in enumerate(values):
            deep(some, folder / f"{split}{number}.png")
            lines.append({**ROW, "image": f"{split}{number}.png", "answer": f"a{number}"})
        (folder / f"{split}.jsonl").write_text("\n".join(map(json.dumps, lines)))
    return folder


@pytest.fixture
def recipe(deep_folder, make_recipe, tiny_fast_vlm):
    def make(**data):
        return make_recipe(tiny_fast_vlm, data={"root": str(deep_folder), **data}, train={"max_steps": 1})

    return make


def shown(rows):
    return [greys(open_image(row.images[0], options=row.image_options)) for row in rows]


def test_the_train_rows_decide_for_all(recipe):
    logged = []
    train_rows = training_rows(recipe(), log=logged.append)
    assert shown(train_rows) == [[0, 56], [0, 187]], "one range for both, not one each"
    assert logged == [
        "image range: 2 train rows have images of more than 8 bits, with values from 0 to 3000; 0 becomes black and "
        "4095 white (data.image_range: auto)."
    ]
    decided = with_image_range(recipe(), train_rows)
    assert decided.data.image_range == [0, 4095]
    logged.clear()
    assert shown(examples_of(decided, "test", log=logged.append)) == [[0, 31], [0, 255]]
    assert "1 of them have values outside this range, which are clipped" in logged[0]
    again = training_rows(recipe(), log=logged.append)  # images are noted by now
    assert [row.image_options for row in again] == [row.image_options for row in train_rows]


@pytest.mark.parametrize(
    ("image_range", "expected"),
    [("file", [[0, 4], [0, 12]]), ([0, 1000], [[0, 230], [0, 255]]), ([500, 1500], [[0, 102], [0, 255]])],
)
def test_a_recipe_states_the_range(recipe, image_range, expected):
    assert shown(training_rows(recipe(image_range=image_range))) == expected


@pytest.mark.parametrize("image_range", [[5, 5], [9, 0], [1], "full", [0, "x"]])
def test_a_range_grows(recipe, image_range):
    with pytest.raises(RecipeError, match=r"data.image_range"):
        recipe(image_range=image_range)


def test_a_mix_decides_by_all_its_rows(deep_folder):
    other = deep_folder / "other"
    other.mkdir()
    deep([0, 60000], other / "x.png")
    (other / "train.jsonl").write_text(json.dumps({**ROW, "image": "x.png"}))
    parts = {
        name: {"data": {"source": "jsonl", "root": str(root)}} for name, root in (("a", deep_folder), ("b", other))
    }
    rows = read_rows(MixData.model_validate({"source": "mix", "sources": parts}))
    assert {row.image_options.range for row in rows} == {(0, 65535)}


@pytest.mark.parametrize("streaming", [False, True])
def test_tables_and_streams_decide_too(deep_folder, make_recipe, tiny_fast_vlm, streaming):
    images = [str(deep_folder / f"train{number}.png") for number in range(2)]
    table = Dataset.from_dict({"image": images, "question": ["?"] * 2, "answer": ["a"] * 2})
    table.cast_column("image", ImageFeature()).to_parquet(deep_folder / "train.parquet")
    data = {"source": "parquet", "root": str(deep_folder), "streaming": streaming}
    made = make_recipe(tiny_fast_vlm, train={"max_steps": 1})
    made = made.model_copy(update={"data": ParquetData.model_validate(data)})
    logged = []
    train_rows = training_rows(made, log=logged.append)
    assert with_image_range(made, train_rows).data.image_range == [0, 4095]
    assert "0 becomes black and 4095 white" in logged[0]
    rows = train_rows.first if streaming else train_rows
    assert sorted(shown(rows)) == [[0, 56], [0, 187]]
    if streaming:
        reader = train_rows.reader()
        assert train_rows.checks.example(reader.at(3)).image_options.range == (0, 4095)


def test_values_beyond_16_bits_need_a_range(read, folder):
    deep([-5, 9], folder / "x.tiff", np.int32)
    with pytest.raises(
        DataError,
        match=r"train rows, images of more than 8 bits: pixel values must fit .*, got values from -5 to 9.*image_range",
    ):
        read({**ROW, "image": "x.tiff"})
    assert read({**ROW, "image": "x.tiff"}, image_range=[-5, 9])[0].image_options.range == (-5, 9)


def test_colours_of_16_bits_are_refused_where_they_would_be_black(read, folder, monkeypatch):
    """PIL reads the upper 8 bits of each channel alone."""
    write_rgb16(folder / "dark.png", 4095)
    write_rgb16(folder / "bright.png", 65535)
    with pytest.raises(
        DataError, match=r"got 1 rows with colour images of 16 bits a channel and values up to 4095 of 65535"
    ):
        read({**ROW, "image": "dark.png"})
    for rows in ([{**ROW, "image": "bright.png"}], [{**ROW, "image": f"{name}.png"} for name in ("dark", "bright")]):
        assert {row.image_options.range for row in read(*rows)} == {None}
    assert read({**ROW, "image": "dark.png"}, image_range="file")
    with pytest.raises(DataError, match=r"colours are not scaled \(data.image_range: \[0, 4095\]\)"):
        read({**ROW, "image": "bright.png"}, image_range=[0, 4095])


def write_rgb16(path, value):
    """Save a PNG of 16 bits a channel, which PIL itself does not write."""
    import struct
    import zlib

    def chunk(name, data):
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    row = b"\0" + struct.pack(">H", value) * 3 * 8
    header = struct.pack(">IIBBBBB", 8, 8, 16, 2, 0, 0, 0)
    data = zlib.compress(row * 8)
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", data) + chunk(b"IEND", b""))


def test_several_pages_of_a_tiff_are_refused_or_chosen(read, folder):
    pages(folder / "x.tiff")
    row = {**ROW, "image": "x.tiff"}
    with pytest.raises(RowError, match="x.tiff: a TIFF must have one page, .*, got several pages. Set data.image_page"):
        read(row)
    for number in (1, 2):
        (found, plain) = read(row, ROW, image_page=number)
        assert greys(open_image(found.images[0], options=found.image_options)) == [50 * number]
        assert open_image(plain.images[0], options=plain.image_options).size == (4, 4)
    with pytest.raises(RowError, match=r"x.tiff: data.image_page must be a page of the TIFF, got 3"):
        read(row, image_page=3)
    with pytest.raises(RowError, match="several pages"):  # what was noted of a page says nothing without one
        read(row)
    logged = []
    assert len(read(*[ROW] * 25, row, on_error="skip", logged=logged)) == 25 and "several pages: 1" in logged[0]


def test_the_first_frame_of_an_animation_is_no_page(folder):
    frames = [Image.new("L", (8, 8), value) for value in (10, 200)]
    for suffix in ("gif", "png", "webp"):
        options = {"lossless": True} if suffix == "webp" else {}
        frames[0].save(folder / f"x.{suffix}", save_all=True, append_images=frames[1:], **options)
        for page in (None, 2):
            assert greys(open_image(folder / f"x.{suffix}", options=ImageOptions(page=page))) == [10]


def test_how_an_image_is_opened_is_part_of_what_it_is_remembered_by(tmp_path):
    path = deep([0, 4095], tmp_path / "x.png")
    options = (ImageOptions(), ImageOptions(range=(0, 4095)), ImageOptions(range=(0, 65535)), ImageOptions(page=2))
    assert len({source_key(path, one) for one in options}) == 4
    assert source_key(path) == source_key(path, ImageOptions())


@pytest.fixture
def adapters(recipe, tiny_fast_vlm, deep_folder):
    """Three adapters trained on other ranges, and the base that they are asked on."""
    registry = AdapterRegistry()
    found = {}
    for name, data in {"auto": {}, "file": {"image_range": "file"}, "own": {"image_range": [0, 1000]}}.items():
        made = recipe(**data)
        made = made.model_copy(
            update={"name": name, "adapter": made.adapter.model_copy(update={"publish": f"t/{name}"})}
        )
        found[name] = train(made, registry=registry)
    return VisionLanguageModel(load_base(str(tiny_fast_vlm), device="cpu"), registry=registry), found, registry


def test_the_range_travels_with_the_adapter(adapters, deep_folder, monkeypatch, recipe):
    vlm, found, registry = adapters
    expected = {"auto": [0, 4095], "file": [0, 65535], "own": [0, 1000]}
    for name, result in found.items():
        manifest = read_folder(result.adapter).manifest
        assert manifest.images == ImageSpec(range=expected[name])
        assert f"the value 0 is black and {expected[name][1]} is white" in (card_of(manifest))
    opened = []
    real = open_image
    monkeypatch.setattr("finetune.data.media.open_image", lambda *a, **k: opened.append(real(*a, **k)) or opened[-1])
    path = deep_folder / "train1.png"  # values up to 3000
    whites = {"t/auto@1": 187, "t/file@1": 12, "t/own@1": 255}
    with Image.open(path) as image:
        ways = {"a path": path, "bytes": path.read_bytes(), "PIL": image, "pixels": read_pixels(path, name="x")}
        for ref in whites:
            with vlm.using(ref):
                for image in ways.values():
                    vlm.ask(image, "What?")
                    vlm.chat([{"role": "user", "content": [{"type": "image", "image": image}]}])
        assert [max(greys(image)) for image in opened] == [w for w in whites.values() for _ in range(2 * len(ways))]
    opened.clear()
    vlm.ask_batch([path] * 4, ["What?"] * 4, adapters=[*whites, None])
    assert sorted(max(greys(image)) for image in opened) == sorted([*whites.values(), 187]), "each row by its adapter"
    opened.clear()
    evaluate(["t/file@1", "base"], [recipe()], registry=registry)
    # A row that is compared with generate is opened again.
    assert [*dict.fromkeys(max(greys(image)) for image in opened if image.size == (32, 40))] == [2, 19, 8, 78], (
        "the base by the rows that it is asked"
    )


def card_of(manifest):
    from finetune.adapters.card import _images

    return " ".join(_images(manifest))


def test_a_page_travels_with_the_adapter(read, folder, make_recipe, tiny_fast_vlm):
    pages(folder / "x.tiff")
    for split in ("train", "val", "test"):
        (folder / f"{split}.jsonl").write_text(json.dumps({**ROW, "image": "x.tiff"}))
    made = make_recipe(tiny_fast_vlm, data={"root": str(folder), "image_page": 2}, train={"max_steps": 1})
    result = train(made)
    assert read_folder(result.adapter).manifest.images == ImageSpec(page=2)
    vlm = VisionLanguageModel(load_base(str(tiny_fast_vlm), device="cpu"))
    with vlm.using(result.adapter):
        assert isinstance(vlm.ask(folder / "x.tiff", "What?"), str)
    with pytest.raises(DataError, match="several pages"):
        vlm.ask(folder / "x.tiff", "What?")


def test_schema_1_kept_the_whole_range_and_the_first_page():
    from finetune.adapters.manifest_schema_1 import from_schema_1

    assert from_schema_1({}, source="x")["images"] == {"range": [0, 65535], "page": 1}
    assert ImageSpec(range=[0, 65535], page=1).options == ImageOptions(range=(0, 65535), page=1)


def test_the_old_scaling_is_that_of_the_full_range(tmp_path):
    values = list(range(0, 65536, 113))
    path = deep(values, tmp_path / "x.png")
    old = (np.resize(np.array(values, np.float64), (40, 32)) / 257).round().clip(0, 255).astype(np.uint8)
    new = np.asarray(open_image(path, options=ImageOptions(range=(0, 65535))))[..., 0]
    assert np.array_equal(old, new)
