"""Pairs of picture and text: what a row becomes, which may be answered, and what is refused."""

import numpy as np
import pytest
import torch

from finetune.build import examples_of, load_base
from finetune.errors import DataError
from finetune.example import Example, answer, show
from finetune.recipe import ContrastiveSection, parse_recipe

PIXELS = np.full((32, 32, 3), 90, np.uint8)


@pytest.fixture(scope="module")
def collator(tiny_clip):
    return load_base(str(tiny_clip), device="cpu").collator


def pair(text, **more):
    messages = [*show(), answer(text)]
    return Example(**{"id": "r1", "messages": messages, "images": [PIXELS], "answers": [text], **more})


def test_a_training_batch_tells_what_is_learnt(collator):
    batch = collator.training_batch([pair("red"), (pair("blue"), True), (pair("red"), False)])
    assert batch.labels.tolist() == [0, 0, -100]
    assert batch.inputs["pixel_values"].shape == (3, 3, 32, 32) and len(batch.inputs["input_ids"]) == 3


def test_a_prompt_batch_holds_each_choice_once(collator):
    choices = {"red": "a red thing", "blue": "a blue thing"}
    batch = collator.prompt_batch([pair("red", choices=choices), pair("hat", choices={"hat": "a hat", **choices})])
    assert batch.labels is None and len(batch.inputs["pixel_values"]) == 2
    decoded = collator.processor.tokenizer.batch_decode(batch.inputs["input_ids"], skip_special_tokens=True)
    assert [text.strip() for text in decoded] == ["a red thing", "a blue thing", "a hat"]
    assert set(collator.prompt_batch([pair("red")]).inputs) == {"pixel_values"}


def test_what_is_shown_of_a_row(collator):
    assert collator.show(pair("a red hat")) == "<its picture> ⟦a red hat⟧"


@pytest.mark.parametrize(
    ("row", "message"),
    [
        (pair("long " * 30), r"row r1: the text 'long .* has 122 tokens, this base takes 64; a text is never cut"),
        (pair("red", images=[PIXELS, PIXELS]), "row r1: 2 pictures; a text is paired with exactly one"),
        (pair("red", images=[]), "row r1: 0 pictures"),
        (pair("red", images=[b"no picture"]), "row r1: its picture: not a readable picture"),
    ],
)
def test_a_row_that_is_no_pair_is_refused(collator, row, message):
    with pytest.raises(DataError, match=message):
        collator.training_batch([row])


def test_right_padding_changes_no_embedding(collator, tiny_clip):
    model = load_base(str(tiny_clip), device="cpu").model
    together = collator.training_batch([pair("red"), pair("a much longer text")]).inputs
    alone = collator.training_batch([pair("red")]).inputs
    with torch.no_grad():
        assert torch.allclose(model(**together).text_embeds[0], model(**alone).text_embeds[0], atol=1e-6)


def procedural(task):
    raw = {
        "name": "pairs",
        "domain": "retail",
        "model": {"name_or_path": "somewhere"},
        "method": {"name": "lora"},
        "data": {"source": "procedural", "name": "retail", "rows": {"train": 8, "test": 12}},
        "task": task,
        "train": {"max_steps": 1},
    }
    return parse_recipe(raw, source="test")


def test_rows_of_a_contrastive_recipe_are_templated_and_choose_among_the_answers_of_their_kind():
    recipe = procedural({"name": "contrastive", "text_template": "a photo: {label}"})
    train, test = examples_of(recipe, "train"), examples_of(recipe, "test")
    assert train[0].messages == [*show(), answer(f"a photo: {train[0].answers[0]}")]
    assert not train[0].choices, "nothing is asked of rows that are learnt"
    for row in test:
        wanted = {other.answers[0] for other in test if other.kind == row.kind}
        assert set(row.choices) == wanted and row.choices[row.answers[0]] == f"a photo: {row.answers[0]}"
    assert not examples_of(procedural({"name": "vqa"}), "test")[0].choices


def test_a_template_holds_its_label():
    with pytest.raises(ValueError, match="must hold {label} exactly once"):
        ContrastiveSection(name="contrastive", text_template="a photo")
