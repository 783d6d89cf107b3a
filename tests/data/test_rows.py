"""Reading rows and pictures: every mistake is named with file and line."""

import io
import json

import numpy as np
import pytest
from PIL import Image

from finetune.data.images import as_source, image_digest, open_image
from finetune.data.jsonl import read_jsonl
from finetune.errors import DataError
from finetune.recipe import JsonlData, VqaSection

ROW = {"image": "a.png", "question": "What?", "answer": "x"}


@pytest.fixture
def read(tmp_path):
    Image.new("RGB", (4, 4)).save(tmp_path / "a.png")

    def read(*lines, **fields):
        text = "\n".join(line if isinstance(line, str) else json.dumps(line) for line in lines)
        (tmp_path / "train.jsonl").write_text(text + "\n")
        section = JsonlData(source="jsonl", root=str(tmp_path), **fields)
        return read_jsonl(section, "train", task=VqaSection(), seed=0)

    return read


def test_fields_are_mapped(read):
    row = {"pic": "a.png", "q": "Where?", "a": ["left", "on the left"], "type": "place"}
    (example,) = read(row, image="pic", question="q", answer="a", kind="type")
    assert example.answers == ["left", "on the left"]
    assert example.kind == "place" and example.id == "train.jsonl:1"
    assert example.messages[-1]["content"][0]["text"] == "left"


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", "train.jsonl, line 2: not JSON"),
        ("[1]", "line 2: a row is a JSON object, not list"),
        ({**ROW, "image": "b.png"}, "line 2: the picture .*b.png does not exist"),
        (
            {"image": "a.png", "answer": "x"},
            "line 2: no field 'question'; the row has image, answer.*data.question=FIELD",
        ),
        ({**ROW, "answer": " "}, "line 2: 'answer' must be a text that is not empty, not ' '"),
        ({**ROW, "answer": ["x", ""]}, "line 2: 'answer' must be a text or a list of texts"),
        ({**ROW, "answer": 3}, "line 2: 'answer' must be a text"),
        ({**ROW, "question": None}, "line 2: 'question' must be a text"),
    ],
)
def test_a_bad_row_is_named(read, line, message):
    with pytest.raises(DataError, match=message):
        read(ROW, line)


def test_no_rows_and_no_file(read, tmp_path):
    with pytest.raises(DataError, match="no rows"):
        read("")
    section = JsonlData(source="jsonl", root=str(tmp_path / "nowhere"))
    with pytest.raises(DataError, match=r"cannot be read .*Check data.root and data.train"):
        read_jsonl(section, "train", task=VqaSection(), seed=0)


def test_a_question_is_a_type_only_where_questions_are_few(read):
    again = read(*[{**ROW, "question": f"{i % 2}?"} for i in range(8)])
    free = read(*[{**ROW, "question": f"{i}?"} for i in range(8)])
    assert {e.kind for e in again} == {"0?", "1?"} and {e.kind for e in free} == {"all"}


def test_unusual_line_ends_stay_in_their_row(read):
    row = json.dumps({**ROW, "answer": "a\u2028b\u0085c"}, ensure_ascii=False)
    assert [e.answers[0] for e in read("\ufeff" + row, ROW)] == ["a\u2028b\u0085c", "x"]


def test_max_rows_chooses_by_seed(read):
    rows = [{**ROW, "answer": str(i)} for i in range(20)]
    few = [e.answers[0] for e in read(*rows, max_rows={"train": 5})]
    assert len(few) == 5 and few == sorted(few, key=int) and few != [str(i) for i in range(5)]
    assert few == [e.answers[0] for e in read(*rows, max_rows={"train": 5})]


@pytest.mark.parametrize("mode", ["L", "RGBA", "P", "CMYK", "1", "LA", "I;16"])
def test_every_mode_becomes_rgb(tmp_path, mode):
    if mode == "I;16":
        image = Image.fromarray(np.full((6, 5), 257 * 200, np.uint16))
    else:
        image = Image.new("RGB", (5, 6), (200, 200, 200)).convert(mode)
    path = tmp_path / f"x.{'jpg' if mode == 'CMYK' else 'png'}"
    image.save(path)
    out = open_image(path)
    assert out.mode == "RGB" and out.size == (5, 6)
    expected = 255 if mode == "1" else 200
    assert abs(int(np.asarray(out).mean()) - expected) < (60 if mode == "1" else 8)


def test_orientation_is_applied(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.new("RGB", (8, 4)).save(tmp_path / "x.jpg", exif=exif)
    assert open_image(tmp_path / "x.jpg").size == (4, 8)


def test_unreadable_pictures_are_named(tmp_path):
    good = io.BytesIO()
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (50, 50, 3), dtype=np.uint8)).save(good, "PNG")
    (tmp_path / "cut.png").write_bytes(good.getvalue()[:2000])
    (tmp_path / "text.png").write_text("hello")
    for name, message in (("cut.png", "not a readable picture"), ("text.png", "not a readable"), ("no.png", "no such")):
        with pytest.raises(DataError, match=f"{name}: {message}"):
            open_image(tmp_path / name)
    with pytest.raises(DataError, match="50 x 50 is over the cap of 100 pixels"):
        open_image(good.getvalue(), max_pixels=100)


def test_pictures_from_an_app(tmp_path):
    Image.new("RGB", (3, 3), "red").save(tmp_path / "a.png")
    for source in (tmp_path / "a.png", str(tmp_path / "a.png"), (tmp_path / "a.png").read_bytes()):
        assert open_image(as_source(source)).getpixel((0, 0)) == (255, 0, 0)
    assert open_image(as_source(Image.new("L", (3, 3), 7))).getpixel((0, 0)) == (7, 7, 7)
    deep = Image.fromarray(np.full((3, 3), 257 * 100, np.uint16))
    assert open_image(as_source(deep)).getpixel((0, 0)) == (100, 100, 100)
    with pytest.raises(DataError, match="must be uint8"):
        as_source(np.zeros((3, 3, 3)))
    with pytest.raises(DataError, match="not int"):
        as_source(3)


def test_a_digest_is_of_content(tmp_path):
    (tmp_path / "a").write_bytes(b"x")
    assert image_digest(tmp_path / "a") == image_digest(b"x")
    assert image_digest(np.zeros((2, 3, 3), np.uint8)) != image_digest(np.zeros((3, 2, 3), np.uint8))
