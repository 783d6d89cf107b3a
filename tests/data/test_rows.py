"""From lines to examples: fields, question types, captions, caps; what stops a whole file."""

import json
from dataclasses import replace

import pytest

from finetune.core.example import draw
from finetune.errors import DataError
from finetune.recipe import JsonlData
from finetune.tasks.vqa import VqaConfig
from tests.data.conftest import ROW, read_rows


def test_fields_are_mapped(read):
    row = {"pic": "good.png", "q": "Where?", "a": ["left", "on the left"], "type": "place", "key": 7}
    (example,) = read(row, image="pic", question="q", answer="a", question_type="type", id="key")
    assert example.answers == ["left", "on the left"]
    assert example.question_type == "place" and example.id == "7"
    assert example.messages[-1]["content"][0]["text"] == "left"


def test_a_row_has_one_image_several_or_none(read, folder):
    rows = [ROW, {**ROW, "image": None, "images": ["good.png", "good.png"]}, {**ROW, "images": []}]
    examples = read(*rows)
    assert [len(e.images) for e in examples] == [1, 2, 0]
    parts = [[part["type"] for part in e.messages[0]["content"]] for e in examples]
    assert parts == [["image", "text"], ["image", "image", "text"], ["text"]]
    assert read(ROW, image=None)[0].images == []


def test_one_question_for_all_rows(read):
    row = {"image": "good.png", "answer": "shirt"}
    examples = read(row, {**row, "question": "Which?"}, default_question="What is it?")
    assert [e.meta["question"] for e in examples] == ["What is it?", "Which?"]
    with pytest.raises(DataError, match="data.question must name a field, got null. .* with data.default_question"):
        read(row, question=None)


def test_captions_are_sampled_by_seed_epoch_and_row(read):
    texts = ["a red square", "something red", "a square"]
    row = {"image": "good.png", "captions": texts}
    one, two = read(row, row, default_question="Describe it.")

    def drawn(example, seed=0):
        return [example.in_epoch(epoch, seed=seed).messages[-1]["content"][0]["text"] for epoch in range(60)]

    assert one.answers == texts and set(drawn(one)) == set(texts)
    assert drawn(one) == drawn(one) and drawn(one) != drawn(two) and drawn(one) != drawn(one, seed=1)
    counts = [sum(draw(3, epoch, "x") == i for epoch in range(3000)) for i in range(3)]
    assert all(900 < count < 1100 for count in counts)
    same = one.in_epoch(3, seed=0)
    assert (same.id, same.images, same.prompt) == (one.id, one.images, one.prompt)
    (plain,) = read(ROW)
    assert plain.in_epoch(5, seed=1) is plain


def test_a_question_is_a_type_only_where_questions_are_few(read):
    again = read(*[{**ROW, "question": f"{i % 2}?"} for i in range(8)])
    free = read(*[{**ROW, "question": f"{i}?"} for i in range(8)])
    assert {e.question_type for e in again} == {"0?", "1?"} and {e.question_type for e in free} == {"all"}


def test_unusual_line_ends_stay_in_their_row(read):
    row = json.dumps({**ROW, "answer": "a\u2028b\u0085c"}, ensure_ascii=False)
    assert [e.answers[0] for e in read(("\ufeff" + row).encode(), ROW)] == ["a\u2028b\u0085c", "x"]


def test_max_rows_chooses_by_seed(read):
    rows = [{**ROW, "answer": str(i)} for i in range(20)]
    few = [e.answers[0] for e in read(*rows, max_rows={"train": 5})]
    assert len(few) == 5 and few == sorted(few, key=int) and few != [str(i) for i in range(5)]
    assert few == [e.answers[0] for e in read(*rows, max_rows={"train": 5})]
    assert few != [e.answers[0] for e in read(*rows, max_rows={"train": 5}, seed=1)]


def test_no_rows_and_no_file(read, tmp_path):
    with pytest.raises(DataError, match="must have at least one row, got none"):
        read(b"", b" ")
    section = JsonlData(source="jsonl", root=str(tmp_path / "nowhere"))
    with pytest.raises(DataError, match=r"cannot be read .*Check data.root and data.train"):
        read_rows(section)
    without = JsonlData(source="jsonl", root=str(tmp_path / "nowhere"), val=None)
    assert read_rows(without, "val") == []


def test_a_conversation_row(read):
    turns = [
        {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "What?"}]},
        {"role": "assistant", "content": "A square."},
        {"role": "user", "content": "Which color?"},
        {"role": "assistant", "content": [{"type": "text", "text": "Red."}]},
    ]
    inside = json.loads(json.dumps(turns))
    inside[0]["content"][0]["path"] = "good.png"
    task = VqaConfig(system_prompt="Be brief.")
    rows = [{"messages": turns, "image": "good.png"}, {"messages": turns, "images": ["good.png"]}, {"messages": inside}]
    examples = read(*rows, ROW, task=task)
    assert [e.messages for e in examples[1:3]] == [examples[0].messages] * 2
    assert [len(e.images) for e in examples] == [1, 1, 1, 1]
    first = examples[0]
    assert [m["role"] for m in first.messages] == ["system", "user", "assistant", "user", "assistant"]
    assert first.answers == ["Red."] and first.meta["question"] == "Which color?"
    own = [{"role": "system", "content": "Mine."}, *turns]
    (example,) = read({"messages": own, "image": "good.png"}, task=task)
    assert example.messages[0]["content"] == [{"type": "text", "text": "Mine."}]


def test_an_example_with_another_text(read):
    (example,) = read(ROW)
    assert example.with_text("y") == replace(example, messages=[*example.prompt, *example.with_text("y").messages[-1:]])
    assert example.with_text("y").messages[-1]["content"] == [{"type": "text", "text": "y"}]
