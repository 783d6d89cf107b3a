"""Every kind of bad row: refused with file and row, or skipped, counted and listed by reason."""

import io
import json
import re

import numpy as np
import pytest
from PIL import Image

from finetune.errors import DataError, RowError
from tests.data.conftest import ROW
from tests.data.test_images import png_claiming

GOOD = 25  # rows before the bad one, on line 26: fewer than one in twenty is bad


def noise(kind):
    buffer = io.BytesIO()
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (50, 50, 3), dtype=np.uint8)).save(buffer, kind)
    return buffer.getvalue()


def flipped(data):
    return data[:2000] + bytes(byte ^ 255 for byte in data[2000:2100]) + data[2100:]


def floats():
    buffer = io.BytesIO()
    Image.fromarray(np.zeros((2, 2), np.float32)).save(buffer, "TIFF")
    return buffer.getvalue()


# What stands in the file bad.png, and what is said of it.
IMAGES = {
    "an empty file": (b"", "unreadable image", "not a readable image"),
    "a text": (b"hello", "unreadable image", "not a readable image"),
    "a page": (b"<html><body>404</body></html>", "unreadable image", "not a readable image"),
    "a drawing": (b"<svg xmlns='http://www.w3.org/2000/svg'/>", "unreadable image", "not a readable image"),
    "a PDF": (b"%PDF-1.4\n%\xe2\xe3", "unreadable image", "not a readable image"),
    "an EPS": (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "unreadable image", "not a readable image"),
    "half a PNG": (noise("PNG")[:3000], "unreadable image", "not a readable image"),
    "half a JPEG": (noise("JPEG")[:1500], "unreadable image", "not a readable image"),
    "a JPEG without its end": (noise("JPEG")[:-20], "unreadable image", "not a readable image"),
    "half a GIF": (noise("GIF")[:1500], "unreadable image", "not a readable image"),
    "half a WebP": (noise("WEBP")[:900], "unreadable image", "not a readable image"),
    "half a BMP": (noise("BMP")[:3000], "unreadable image", "not a readable image"),
    "a header alone": (noise("PNG")[:33], "unreadable image", "not a readable image"),
    "damaged bytes": (flipped(noise("PNG")), "unreadable image", "not a readable image"),
    "no pixels": (png_claiming(0, 5), "unreadable image", "not a readable image"),
    "fewer pixels than claimed": (png_claiming(9, 9), "unreadable image", "not a readable image"),
    "floating point": (floats(), "unreadable image", "floating-point"),
    "over the cap": (png_claiming(8000, 8000), "image over the pixel cap", "pixels, got 8000 x 8000"),
    "a bomb": (png_claiming(60000, 60000), "image over the pixel cap", "at most twice PIL's own cap of"),
}


def user(*parts):
    return {"role": "user", "content": list(parts)}


IMAGE, TEXT = {"type": "image"}, {"type": "text", "text": "What?"}
ASK, ANSWER = user(IMAGE, TEXT), {"role": "assistant", "content": "x"}


def conversation(*messages, **fields):
    return {"image": "good.png", "messages": list(messages), **fields}


def without(*fields):
    return {key: value for key, value in ROW.items() if key not in fields}


# The bad line, the reason it is counted under, and what is said of it behind file and line.
LINES = {
    "half an object": (
        b'{"image": "good.png", "que', "not JSON", "must be one JSON object on one line, got text that is not JSON: ",
    ),
    "no JSON": (
        b"image,question,answer", "not JSON", "must be one JSON object on one line, got text that is not JSON: ",
    ),
    "two objects": (b"{} {}", "not JSON", "must be one JSON object on one line, got text that is not JSON: "),
    "a list": ([1], "not JSON", "a row must be a JSON object, got list"),
    "a text": ("x", "not JSON", "a row must be a JSON object, got str"),
    "null": (b"null", "not JSON", "a row must be a JSON object, got NoneType"),
    "endless nesting": (b"[" * 200_000, "not JSON", "must be one JSON object on one line, got text that is not JSON: "),
    "Latin-1": ('{"answer": "é"}'.encode("latin-1"), "not UTF-8", "must be UTF-8 text, got bytes that are not: "),
    "no image": (
        without("image"), "missing image", "a row must have the field 'image', got question, answer. .*data.image=",
    ),
    "a number for an image": ({**ROW, "image": 3}, "wrong type", "an image must be the path of its file, got 3"),
    "an empty path": ({**ROW, "image": ""}, "wrong type", "an image must be the path of its file, got ''"),
    "a missing file": ({**ROW, "image": "no.png"}, "missing image", "the image .*no.png does not exist"),
    "a folder": ({**ROW, "image": "."}, "missing image", "must be the path of its file, got the folder"),
    "images that are no list": ({**ROW, "images": "good.png"}, "wrong type", "'images' must be a list of images, got"),
    "a null among images": (
        {**ROW, "images": ["good.png", None]}, "missing image", "an image must be the path of its file, got null",
    ),
    "no question": (without("question"), "missing question", "a row must have the field 'question', got image, answer"),
    "a null question": ({**ROW, "question": None}, "missing question", "'question' must be a non-empty text"),
    "a blank question": ({**ROW, "question": " \n"}, "empty question", "'question' must be a non-empty text, got"),
    "a number for a question": ({**ROW, "question": 4}, "wrong type", "'question' must be a non-empty text, got 4"),
    "questions": ({**ROW, "question": ["a", "b"]}, "wrong type", "'question' must be a non-empty text"),
    "no answer": (without("answer"), "missing answer", "a row must have the field 'answer', got image, question"),
    "a blank answer": ({**ROW, "answer": " "}, "empty answer", "'answer' must be a non-empty text, got ' '"),
    "no answers": ({**ROW, "answer": []}, "empty answer", "a non-empty text or a list of non-empty texts, got"),
    "a blank among answers": (
        {**ROW, "answer": ["x", ""]}, "empty answer", "must be a non-empty text or a list of non-empty",
    ),
    "a number among answers": (
        {**ROW, "answer": ["x", 1]}, "wrong type", "must be a non-empty text or a list of non-empty",
    ),
    "a number for an answer": ({**ROW, "answer": 3}, "wrong type", "must be a non-empty text or a list of non-empty"),
    "not a number": (
        b'{"image": "good.png", "question": "?", "answer": NaN}', "wrong type", "must be a non-empty text",
    ),
    "yes as a truth value": ({**ROW, "answer": True}, "wrong type", "must be a non-empty text"),
    "an object for an answer": ({**ROW, "answer": {"en": "x"}}, "wrong type", "must be a non-empty text"),
    "no captions": (
        {**without("answer"), "captions": []}, "empty captions", "'captions' must be a non-empty text or a list",
    ),
    "a blank caption": (
        {**without("answer"), "captions": ["", "x"]}, "empty captions", "a list of non-empty texts, got",
    ),
    "one text for captions": ({**without("answer"), "captions": "x"}, "wrong type", "'captions' must be"),
    "captions and an answer": ({**ROW, "captions": ["x"]}, "several fields to supervise", "'captions' and 'answer'"),
    "a conversation and an answer": (
        {**ROW, "messages": [ASK, ANSWER]}, "several fields to supervise", "data.messages=null",
    ),
    "no list of messages": (
        conversation() | {"messages": "hi"}, "not a conversation", "must be a non-empty list of messages",
    ),
    "no messages": (conversation(), "not a conversation", "must be a non-empty list of messages, got"),
    "a message that is a text": (
        conversation("hi"), "not a conversation", "message 1: a message must be an object with role and content",
    ),
    "an unknown role": (
        conversation({"role": "gpt", "content": "x"}), "not a conversation",
        "the role must be one of system, user, assistant, got 'gpt'",
    ),
    "the assistant first": (
        conversation(ANSWER), "not a conversation", "at the start the role must be user, got assistant",
    ),
    "the user twice": (
        conversation(ASK, ASK, ANSWER), "not a conversation", "after user the role must be assistant, got user",
    ),
    "the user last": (conversation(ASK), "nothing to supervise", "must end with a turn of the assistant, got user"),
    "a late system prompt": (
        conversation(ASK, {"role": "system", "content": "x"}), "not a conversation",
        "after user the role must be assistant, got system",
    ),
    "no content": (
        conversation({"role": "user"}), "not a conversation", "content must be a text or a non-empty list of parts",
    ),
    "an unknown part": (conversation(user({"type": "audio"})), "not a conversation", "a part must be .*, got"),
    "a part that is a text": (conversation(user("x")), "not a conversation", "a part must be .*, got 'x'"),
    "an empty question in a conversation": (
        conversation(user(), ANSWER), "not a conversation", "content must be a text or",
    ),
    "an empty user text": (
        conversation(user({"type": "text", "text": ""})), "empty text", "role user must have a non-empty text, got ''",
    ),
    "an empty turn": (
        conversation(ASK, {"role": "assistant", "content": " "}), "empty text",
        "role assistant must have a non-empty text, got ' '",
    ),
    "an image the assistant shows": (
        conversation(ASK, {"role": "assistant", "content": [IMAGE]}), "not a conversation",
        "only messages of the user may hold images",
    ),
    "an image on the web": (
        conversation(user({"type": "image", "url": "http://x/y.png"}, TEXT), ANSWER), "not a conversation",
        "got url. Save the image",
    ),
    "a place without its image": (
        conversation(ASK, ANSWER, images=[]), "images and image parts differ", "1 parts for 0 images",
    ),
    "an image without a place": (
        conversation(user(TEXT), ANSWER), "images and image parts differ", "0 parts for 1 images",
    ),
    "images inside and beside": (
        conversation(user({"type": "image", "path": "good.png"}), ANSWER, images=["good.png"]),
        "images twice",
        "got both",
    ),
    "one of two images named": (
        conversation(user(IMAGE, {"type": "image", "path": "good.png"}), ANSWER), "not a conversation", "1 of 2 parts",
    ),
}  # fmt: skip


@pytest.mark.parametrize("kind", LINES)
def test_a_bad_line_is_named_or_skipped(read, folder, kind):
    line, reason, message = LINES[kind]
    lines = [*[ROW] * GOOD, line]
    where = re.escape(f"{folder / 'train.jsonl'}, line {GOOD + 1}")
    with pytest.raises(RowError, match=f"^{where}.*{message}"):
        read(*lines)
    logged = []
    assert len(read(*lines, on_error="skip", logged=logged)) == GOOD
    (report,) = logged
    assert f"skipped 1 of {GOOD + 1} train rows" in report and f"\n  {reason}: 1\n" in report
    assert re.search(f"    {where}.*{message}", report)


@pytest.mark.parametrize("kind", IMAGES)
def test_a_bad_image_is_named_or_skipped(read, folder, kind):
    data, reason, message = IMAGES[kind]
    (folder / "bad.png").write_bytes(data)
    lines = [*[ROW] * GOOD, {**ROW, "image": "bad.png"}]
    where = re.escape(f"row train.jsonl:{GOOD + 1}: {folder / 'bad.png'}: ")
    with pytest.raises(RowError, match=f"^{where}.*{message}"):
        read(*lines)
    logged = []
    assert len(read(*lines, on_error="skip", logged=logged)) == GOOD
    assert f"\n  {reason}: 1\n" in logged[0] and re.search(f"    {where}.*{message}", logged[0])


@pytest.mark.parametrize(
    ("bad", "options", "reason", "message"),
    [
        (
            {**ROW, "key": 3},
            {"id": "key"},
            "duplicate id",
            "line 26: the id of a row must be unique, but '3' is given twice, first in .*train.jsonl, line 4",
        ),
        (ROW, {"id": "key"}, "missing id", "line 26: a row must have the field 'key'"),
        ({**ROW, "key": 1.5}, {"id": "key"}, "wrong type", "line 26: 'key' must be a non-empty text"),
        (
            {**ROW, "key": ""},
            {"question_type": "key"},
            "empty question_type",
            "line 26: 'key' must be a non-empty text",
        ),
        (ROW, {"question_type": "key"}, "missing question_type", "line 26: a row must have the field 'key'"),
    ],
)
def test_ids_and_question_types(read, bad, options, reason, message):
    lines = [*[{**ROW, "key": i} for i in range(GOOD)], bad]
    with pytest.raises(RowError, match=message):
        read(*lines, **options)
    logged = []
    assert len(read(*lines, **options, on_error="skip", logged=logged)) == GOOD
    assert f"\n  {reason}: 1\n" in logged[0]


def test_a_recipe_that_supervises_only_captions(read):
    with pytest.raises(RowError, match="line 1: a row must have a field to supervise, got none of "):
        read(ROW, answer=None)


def test_there_are_at_least_forty_kinds():
    assert len(LINES) + len(IMAGES) + 5 >= 40


def test_more_than_one_row_in_twenty_is_an_error(read):
    lines = [*[ROW] * 38, b"{", {**ROW, "image": "no.png"}]
    logged = []
    assert len(read(*lines, on_error="skip", logged=logged)) == 38 and "skipped 2 of 40 train rows" in logged[0]
    with pytest.raises(DataError, match=r"(?s)skipped 3 of 41 train rows.*not JSON: 2.*A run may skip at most 5%"):
        read(*lines, b"{", on_error="skip")


def test_the_report_names_twenty_rows_a_reason(read):
    logged = []
    read(*[ROW] * 600, *[b"{"] * 30, on_error="skip", logged=logged)
    assert "  not JSON: 30\n" in logged[0] and logged[0].count("line ") >= 20 and logged[0].endswith("and 10 more")


def test_rows_left_out_by_a_cap_do_not_hide_bad_ones(read, folder):
    (folder / "bad.png").write_bytes(b"x")
    lines = [{**ROW, "image": "bad.png" if i % 2 else "good.png"} for i in range(400)]
    with pytest.raises(DataError, match=r"skipped \d+ of 10 train rows"):
        read(*lines, on_error="skip", max_rows={"train": 10})


def test_lines_are_json():
    for line, _, _ in LINES.values():
        assert isinstance(line, bytes) or json.dumps(line)
