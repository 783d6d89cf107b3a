"""A row's tokens are known without opening its images, and equal to what the processor makes of it."""

from dataclasses import replace

import numpy as np
import pytest
from PIL import Image

from finetune.assemble.loading import load_base
from finetune.assemble.rows import examples_of
from finetune.core.example import Example, answer, as_images, ask
from finetune.data import images
from finetune.data.lengths import Lengths
from finetune.errors import DataError


@pytest.fixture
def base(tiny_base):
    return load_base(str(tiny_base), device="cpu")


def example(*sizes, text="blue"):
    images = [np.zeros((height, width, 3), np.uint8) for width, height in sizes]
    messages = [*ask("What color is it?", num_images=len(sizes)), answer(text)]
    return Example(id="x", messages=messages, media=as_images(images), answers=[text])


@pytest.mark.parametrize("sizes", [[], [(30, 20)], [(20, 90)], [(30, 20), (64, 64)], [(30, 20), (30, 20)]])
def test_the_length_is_what_the_processor_makes(base, sizes):
    lengths = Lengths(base.collator, key="k")
    row = example(*sizes)
    assert lengths.of_training_row(row, sizes).row == base.collator.training_batch([row]).inputs["input_ids"].shape[1]
    assert lengths.of_prompt(row, sizes).row == base.collator.prompt_batch([row]).inputs["input_ids"].shape[1]


def test_tiles_count(base):
    """A processor that cuts large images into tiles gives them more tokens."""
    if not hasattr(base.processor.image_processor, "do_image_splitting"):
        pytest.skip("this processor makes no tiles")
    base.processor.image_processor.do_image_splitting = True
    base.processor.image_processor.size = {"longest_edge": 64}
    lengths = Lengths(base.collator, key="tiles")
    for size in ((64, 64), (64, 20), (20, 64)):
        row = example(size)
        assert (
            lengths.of_training_row(row, [size]).row == base.collator.training_batch([row]).inputs["input_ids"].shape[1]
        )
    assert lengths.of_images(((64, 64),)) > lengths.of_images(((64, 20),))


def test_the_processor_is_asked_once_for_each_size(base, monkeypatch):
    asked = []
    encode = base.collator.encode
    monkeypatch.setattr(base.collator, "encode", lambda rows, side: asked.append(1) or encode(rows, side))
    for _ in range(2):
        lengths = Lengths(base.collator, key="k")
        assert lengths.of_images(((30, 20),)) == lengths.of_images(((30, 20),))
    assert len(asked) == 1, "the second time from the notes"
    Lengths(base.collator, key="another processor").of_images(((30, 20),))
    assert len(asked) == 2


def test_the_longest_caption_counts(base):
    row = replace(example((30, 20)), captions=["red", "red, blue and green, and one more of each"])
    lengths = Lengths(base.collator, key="k")
    assert lengths.of_training_row(row, [(30, 20)]) == lengths.of_training_row(
        row.with_text(row.captions[1]), [(30, 20)]
    )


@pytest.fixture
def recipe(make_recipe, tiny_base):
    return lambda **data: make_recipe(tiny_base, data=data)


def lengths_of(base, rows):
    return [base.collator.training_batch([row]).inputs["input_ids"].shape[1] for row in rows]


def test_rows_that_do_not_fit_are_refused_or_dropped_and_never_cut(base, recipe):
    rows = examples_of(recipe(), "train")
    counts = lengths_of(base, rows)
    limit = sorted(counts)[9]
    long = [row.id for row, count in zip(rows, counts, strict=True) if count > limit]
    assert 0 < len(long) < len(rows)
    with pytest.raises(
        DataError, match=f"(?s){len(long)} of 18 train rows are longer than {limit} tokens: .*{long[0]} .*too_long=drop"
    ):
        examples_of(recipe(max_length=limit), "train", base=base)
    logged = []
    kept = examples_of(recipe(max_length=limit, too_long="drop"), "train", base=base, log=logged.append)
    assert [row.id for row in kept] == [row.id for row in rows if row.id not in long]
    assert [row.num_tokens for row in kept] == [count for count in counts if count <= limit]
    assert f"{len(long)} of 18 train rows" in logged[0] and all(i in logged[0] for i in long)
    assert max(lengths_of(base, kept)) <= limit
    with pytest.raises(DataError, match="No row is left"):
        examples_of(recipe(max_length=3, too_long="drop"), "train", base=base)


def test_rows_to_evaluate_leave_room_for_their_answer(base, recipe):
    rows = examples_of(recipe(), "test")
    longest = max(base.collator.prompt_batch([row]).inputs["input_ids"].shape[1] for row in rows)
    assert len(examples_of(recipe(max_length=longest + 4), "test", base=base)) == 4
    with pytest.raises(DataError, match="test rows are longer"):
        examples_of(recipe(max_length=longest + 3), "test", base=base)  # task.max_new_tokens is 4


def test_the_base_sets_the_limit(base, recipe, monkeypatch):
    monkeypatch.setattr(base.model.config.get_text_config(), "max_position_embeddings", 12)
    with pytest.raises(DataError, match="longer than 12 tokens"):
        examples_of(recipe(), "train", base=base)
    with pytest.raises(DataError, match="data.max_length must be at most 12, .* the base takes, got 13"):
        examples_of(recipe(max_length=13), "train", base=base)


def test_no_image_is_opened_again(base, recipe, monkeypatch, rested):
    examples_of(recipe(), "train")

    def opened(*_, **__):
        raise AssertionError("an image was opened")

    monkeypatch.setattr(images.Image, "open", opened)
    assert len(examples_of(recipe(), "train", base=base)) == 18


def test_a_row_that_the_template_cannot_take_is_a_bad_row(base, recipe, rows_folder):
    path = rows_folder / "train.jsonl"
    lines = path.read_text().splitlines()
    path.write_text("\n".join([*lines * 2, lines[0].replace("What color", "<|end|> color")]) + "\n")
    with pytest.raises(DataError, match="row train.jsonl:37, message 1 .user.: the text holds '<.end.>'"):
        examples_of(recipe(), "train", base=base)
    logged = []
    assert len(examples_of(recipe(on_error="skip"), "train", base=base, log=logged.append)) == 36
    assert "text with a special token: 1" in logged[0]
    path.write_text(path.read_text() + "{")  # 1 of 38 cannot be read and 1 cannot be put: together over one in twenty
    with pytest.raises(DataError, match="(?s)skipped 2 of 38 train rows.*at most 5% of the rows"):
        examples_of(recipe(on_error="skip"), "train", base=base)


def test_a_large_size_is_not_drawn_from_the_file(base, tmp_path):
    Image.new("RGB", (3000, 2000)).save(tmp_path / "x.png")
    lengths = Lengths(base.collator, key="k")
    assert lengths.of_images(((3000, 2000),)) > 0
