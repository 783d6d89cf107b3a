"""Pairs of image and text: what a row becomes, which may be answered, and what is refused."""

import json

import numpy as np
import pytest
import torch
from PIL import Image

from finetune.assemble.loading import load_base
from finetune.assemble.rows import examples_of
from finetune.core.example import Example, answer, as_images, show, text_of
from finetune.data.columns import require_columns
from finetune.data.lengths import fitting
from finetune.data.pairs import PairLengths
from finetune.data.splits import tally
from finetune.errors import DataError
from finetune.recipe import JsonlData, parse_recipe
from finetune.tasks.contrastive import ContrastiveConfig
from finetune.tasks.vqa import VqaConfig
from tests.data.conftest import read_rows

PIXELS = np.full((32, 32, 3), 90, np.uint8)


@pytest.fixture(scope="module")
def collator(tiny_clip):
    return load_base(str(tiny_clip), device="cpu").collator


def pair(text, **more):
    messages = [*show(), answer(text)]
    return Example(**{"id": "r1", "messages": messages, "media": as_images([PIXELS]), "answers": [text], **more})


def test_a_training_batch_marks_what_is_supervised(collator):
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
    assert collator.show(pair("a red hat")) == "<its image> ⟦a red hat⟧"


@pytest.mark.parametrize(
    ("row", "message"),
    [
        (
            pair("long " * 30),
            r"row r1: a text must have at most 64 tokens for this base, got 122 in 'long .* A text is never cut",
        ),
        (
            pair("red", media=as_images([PIXELS, PIXELS])),
            "row r1: a row must have exactly one image beside its text, got 2 images",
        ),
        (pair("red", media=()), "row r1: a row must have exactly one image beside its text, got 0 images"),
        (pair("red", media=as_images([b"no image"])), "row r1: its image: not a readable image"),
    ],
)
def test_a_row_that_is_no_pair_is_refused(collator, row, message):
    with pytest.raises(DataError, match=message):
        collator.training_batch([row])


def test_right_padding_changes_no_embedding(collator, tiny_clip):
    model = load_base(str(tiny_clip), device="cpu").model
    batched = collator.training_batch([pair("red"), pair("a much longer text")]).inputs
    alone = collator.training_batch([pair("red")]).inputs
    with torch.no_grad():
        # Embeddings of length 1; two rows and one are products of other sizes.
        assert torch.allclose(model(**batched).text_embeds[0], model(**alone).text_embeds[0], atol=1e-5)


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


def test_rows_of_a_contrastive_recipe_are_templated_and_choose_among_the_answers_of_their_question_type():
    recipe = procedural({"name": "contrastive", "text_template": "a photo: {label}"})
    train, test = examples_of(recipe, "train"), examples_of(recipe, "test")
    assert train[0].messages == [*show(), answer(f"a photo: {train[0].answers[0]}")]
    assert not train[0].choices, "nothing is asked of rows that are supervised"
    for row in test:
        wanted = {other.answers[0] for other in test if other.question_type == row.question_type}
        assert set(row.choices) == wanted and row.choices[row.answers[0]] == f"a photo: {row.answers[0]}"
    assert not examples_of(procedural({"name": "vqa"}), "test")[0].choices


PAIRS = ContrastiveConfig(name="contrastive", text_template="a photo: {label}")


def read(folder, *rows, task=PAIRS):
    Image.fromarray(PIXELS).save(folder / "p.png")
    (folder / "train.jsonl").write_text("".join(json.dumps({"image": "p.png", **row}) + "\n" for row in rows))
    return read_rows(JsonlData(source="jsonl", root=str(folder)), task=task)


def test_answers_captions_and_conversations_become_texts_and_need_no_question(tmp_path):
    turns = [{"role": "user", "content": "What is it?"}, {"role": "assistant", "content": "a hat"}]
    turns[0]["content"] = [{"type": "image"}, {"type": "text", "text": "What is it?"}]
    answered, captioned, conversation = read(
        tmp_path, {"answer": "red"}, {"captions": ["a cap", "a hat"]}, {"messages": turns}
    )
    assert text_of(answered.messages[-1]) == "a photo: red" and answered.answers == ["red"]
    seen = {text_of(captioned.in_epoch(epoch, seed=0).messages[-1]) for epoch in range(20)}
    assert seen == {"a photo: a cap", "a photo: a hat"} and captioned.answers == ["a cap", "a hat"]
    assert text_of(conversation.messages[-1]) == "a photo: a hat" and conversation.answers == ["a hat"]
    assert {row.question_type for row in (answered, captioned, conversation)} == {"all"}
    with pytest.raises(DataError, match="a row must have the field 'question'"):
        read(tmp_path, {"answer": "red"}, task=VqaConfig())


def test_a_table_of_pairs_needs_no_column_of_questions():
    section = JsonlData(source="jsonl", root="x")
    require_columns(section, ["image", "answer"], PAIRS, where="t")
    with pytest.raises(DataError, match="the table must have the question column 'question', got none"):
        require_columns(section, ["image", "answer"], VqaConfig(), where="t")


def test_texts_are_counted_and_those_too_long_left_out_or_refused(collator, tmp_path):
    rows = read(tmp_path, {"answer": "red"}, {"captions": ["red", "long " * 30]})

    def fit(**options):
        section = JsonlData(source="jsonl", root=str(tmp_path), **options)
        bad = tally(section, "train", log=lambda text: None)
        return fitting(rows, PairLengths(collator), section, "train", limit=64, room=0, bad=bad)

    assert [(row.id, row.num_tokens) for row in fit(too_long="drop")] == [("train.jsonl:1", 12)]
    with pytest.raises(DataError, match=r"longer than 64 tokens: .*train.jsonl:2 \(129\)"):
        fit()


def test_the_answer_of_a_row_that_was_left_out_is_no_choice(make_recipe, tiny_clip, tmp_path):
    Image.fromarray(PIXELS).save(tmp_path / "p.png")
    rows = [json.dumps({"image": "p.png", "answer": answer}) for answer in ("red", "long " * 30, "blue")]
    (tmp_path / "test.jsonl").write_text("\n".join(rows))
    data = {"root": str(tmp_path), "too_long": "drop"}
    recipe = make_recipe(tiny_clip, data=data, task={"name": "contrastive"})
    base = load_base(str(tiny_clip), device="cpu")
    rows = examples_of(recipe, "test", base=base, log=lambda text: None)
    assert [set(row.choices) for row in rows] == [{"red", "blue"}] * 2


def test_a_template_holds_its_label():
    with pytest.raises(ValueError, match="must hold {label} exactly once"):
        ContrastiveConfig(name="contrastive", text_template="a photo")
