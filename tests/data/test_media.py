"""The media of a row: in order, each of a type, and refused where the base does not take that type."""

from dataclasses import dataclass, replace
from types import SimpleNamespace
from typing import ClassVar

import numpy as np
import pytest
import torch
from PIL import Image as Pixels

from finetune.assemble.loading import load_base
from finetune.core.batch import Rendered
from finetune.core.example import Example, Image, answer, as_images, ask, show
from finetune.data.bad_rows import BadRows
from finetune.data.lengths import fitting
from finetune.errors import DataError, ModelError, RowError, TrainingError
from finetune.evaluation.predict import blanked
from finetune.families.clip import ClipFamily
from finetune.families.idefics3 import Idefics3Family
from finetune.recipe import JsonlData
from finetune.runs.saving import data_digest
from finetune.training.deepspeed import DeepSpeed
from tests.tiny import save_idefics3

PIXELS = np.zeros((32, 32, 3), np.uint8)


@dataclass(frozen=True)
class Sound:
    """A medium that no base here takes."""

    type: ClassVar[str] = "sound"
    source: bytes = b""


def row(*media, number="7"):
    messages = [*ask("What?", num_images=sum(m.type == "image" for m in media)), answer("red")]
    return Example(id=number, messages=messages, media=media, answers=["red"])


def pair(*media):
    return Example(id="7", messages=[*show(), answer("red")], media=media, answers=["red"], choices={"red": "red"})


def test_media_are_kept_in_order_and_images_are_a_view_of_them():
    example = row(Image(b"a"), Sound(), Image(b"b"))
    assert example.media_types == ("image", "sound", "image")
    assert example.images == [b"a", b"b"]
    assert as_images([b"a", b"b"]) == (Image(b"a"), Image(b"b"))
    assert replace(example, media=()).images == []


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return load_base(str(save_idefics3(tmp_path_factory.mktemp("media") / "base")), device="cpu")


@pytest.fixture(scope="module")
def dual(tiny_clip):
    return load_base(str(tiny_clip), device="cpu")


REFUSED = "row 7: {} takes media of the type image, and medium {} of the row is of the type sound. Leave such rows out"


@pytest.mark.parametrize("put", ["training_batch", "prompt_batch"])
def test_a_medium_that_the_base_does_not_take_is_refused(base, put):
    with pytest.raises(RowError, match=REFUSED.format("idefics3", 2)):
        getattr(base.collator, put)([row(Image(PIXELS), Sound())])


@pytest.mark.parametrize("count", ["of_training_row", "of_prompt"])
def test_it_is_found_when_lengths_are_counted_before_the_first_step(base, count):
    with pytest.raises(RowError, match=REFUSED.format("idefics3", 1)) as caught:
        getattr(base.lengths(base.default_task), count)(row(Sound()), [])
    assert caught.value.reason == "sound for a base that takes none"


@pytest.mark.parametrize("split", ["train", "test"])
def test_such_rows_may_be_left_out(base, split):
    logged = []
    section = JsonlData(source="jsonl", root="rows", on_error="skip")
    bad = BadRows(split, on_error="skip", log=logged.append)
    bad.tried = 40
    rows = [*(row(Image(PIXELS), number=str(i)) for i in range(2)), row(Image(PIXELS), Sound())]
    found = fitting(rows, base.lengths(base.default_task), section, split, limit=None, room=0, bad=bad)
    assert [one.id for one in found] == ["0", "1"]
    bad.conclude()
    assert f"skipped 1 of 40 {split} rows" in logged[0] and "sound for a base that takes none: 1" in logged[0]


def test_a_dual_encoder_refuses_it_too(dual):
    wrong = pair(Image(PIXELS), Sound())
    for put in (dual.collator.training_batch, dual.collator.prompt_batch):
        with pytest.raises(RowError, match=REFUSED.format("clip", 2)):
            put([wrong])
    for count in (dual.lengths(dual.default_task).of_training_row, dual.lengths(dual.default_task).of_prompt):
        with pytest.raises(RowError, match=REFUSED.format("clip", 2)):
            count(wrong, [])


def test_the_family_decides_what_it_takes(base, dual, monkeypatch):
    plain = row(Image(PIXELS))
    base.collator.prompt_batch([plain])
    monkeypatch.setattr(Idefics3Family, "media", frozenset({"video"}))
    with pytest.raises(RowError, match="row 7: idefics3 takes media of the type video, and medium 1 .* the type image"):
        base.collator.prompt_batch([plain])
    monkeypatch.setattr(ClipFamily, "media", frozenset())
    with pytest.raises(RowError, match="row 7: clip takes no media, and medium 1 of the row is of the type image"):
        dual.collator.training_batch([pair(Image(PIXELS))])


def test_a_medium_that_a_family_takes_and_nothing_opens_is_refused(base, dual, monkeypatch):
    monkeypatch.setattr(Idefics3Family, "media", frozenset({"image", "sound"}))
    monkeypatch.setattr(ClipFamily, "media", frozenset({"image", "sound"}))
    match = "row 7: this collator opens .* image only, and medium 2 of the row is of the type sound, which {} takes"
    wrong = row(Image(PIXELS), Sound())
    for call in (
        lambda: base.collator.training_batch([wrong]),
        lambda: base.collator.prompt_batch([wrong]),
        lambda: base.lengths(base.default_task).of_training_row(wrong, [(32, 32)]),
        lambda: base.lengths(base.default_task).of_prompt(wrong, [(32, 32)]),
    ):
        with pytest.raises(RowError, match=match.format("idefics3")):
            call()
    with pytest.raises(RowError, match=match.format("clip")):
        dual.collator.training_batch([pair(Image(PIXELS), Sound())])


def test_a_family_refuses_what_is_no_image(base, dual):
    text = base.collator.render(ask("What?"), for_answer=True)
    with pytest.raises(ModelError, match="each medium of a row must be an image, got Sound .row "):
        base.family.encode(base.processor, [Rendered(text, (Sound(),))], padding_side="right")
    with pytest.raises(ModelError, match="each medium of a row must be an image, got Sound .row 'red'"):
        dual.family.encode(dual.processor, [Rendered("red", (Sound(),))], padding_side="right")


def test_rendered_rows_become_inputs_in_order(dual):
    white, black = (Pixels.new("RGB", (32, 32), color) for color in ("white", "black"))
    pairs = dual.family.encode(
        dual.processor, [Rendered("red", (white,)), Rendered("a blue square", (black,))], padding_side="right"
    )
    separate = dual.family.encode(
        dual.processor,
        [Rendered(None, (white,)), Rendered(None, (black,)), Rendered("red"), Rendered("a blue square")],
        padding_side="right",
    )
    assert pairs.keys() == separate.keys() and all(torch.equal(pairs[name], separate[name]) for name in pairs)
    assert pairs["pixel_values"][0].mean() > pairs["pixel_values"][1].mean()
    assert "pixel_values" not in dual.family.encode(dual.processor, [Rendered("red")], padding_side="right")
    assert "input_ids" not in dual.family.encode(dual.processor, [Rendered(None, (white,))], padding_side="right")


def test_rows_with_and_without_a_type_cannot_be_mixed_under_deepspeed():
    engine = object.__new__(DeepSpeed)
    engine._plugin = SimpleNamespace(zero_stage=2)
    image, both = row(Image(PIXELS), number="1"), row(Image(PIXELS), Sound(), number="2")
    engine.check_rows({"train": [image, image]})
    engine.check_rows({"train": [both, both]})
    engine.check_rows({"train": [row(), row()]})
    with pytest.raises(
        TrainingError, match="must have a medium of the type sound, but 1 of 2 rows have none, such as 1"
    ):
        engine.check_rows({"train": [image, both]})


def test_a_blank_image_stands_for_images_only():
    (blank,), places = blanked([row(Image(b"a"), Sound(b"s"), Image(b"b"))])
    assert places == [0] and blank.media_types == ("image", "sound", "image") and blank.media[1] == Sound(b"s")
    assert all((pixels == 128).all() for pixels in blank.images)


def test_rows_of_a_manifest_show_images():
    assert data_digest([row(Image(PIXELS))]) != data_digest([row(Image(PIXELS + 1))])
    with pytest.raises(DataError, match="row 7: the media of a row must be images, .* got a medium of the type sound"):
        data_digest([row(Image(PIXELS), Sound())])
