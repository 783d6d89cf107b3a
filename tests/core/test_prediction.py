"""Predictions: what people read of them, and the way into JSON and back."""

import json

import pytest

from finetune.core.prediction import (
    Box,
    Boxes,
    Embedding,
    Image,
    Label,
    Number,
    Ranking,
    Text,
    prediction_from_json,
)
from finetune.errors import DataError
from finetune.tasks.generation import Answer

BOX = Box(x1=1.0, y1=2.0, x2=30.5, y2=40.0, label="tumor", score=0.75)


@pytest.mark.parametrize(
    ("prediction", "read", "data"),
    [
        (Text(text="a cat"), "a cat", {"type": "text", "text": "a cat", "finish_reason": "stop"}),
        (Text(text="a c", finish_reason="length"), "a c", {"type": "text", "text": "a c", "finish_reason": "length"}),
        (Label(label="red", scores={"red": 0.75, "blue": 0.25}), "red",
         {"type": "label", "label": "red", "scores": {"red": 0.75, "blue": 0.25}}),
        (Number(value=12.5, unit="mm"), "12.5 mm", {"type": "number", "value": 12.5, "unit": "mm"}),
        (Number(value=3.0), "3", {"type": "number", "value": 3.0, "unit": None}),
        (Boxes(boxes=(BOX,)), "tumor [1, 2, 30.5, 40]", {"type": "boxes", "boxes": [
            {"x1": 1.0, "y1": 2.0, "x2": 30.5, "y2": 40.0, "label": "tumor", "score": 0.75}]}),
        (Boxes(boxes=()), "", {"type": "boxes", "boxes": []}),
        (Image(path="a.png", sha256="0" * 64), "a.png", {"type": "image", "path": "a.png", "sha256": "0" * 64}),
        (Embedding(values=(0.5, -1.0)), "embedding of 2 values", {"type": "embedding", "values": [0.5, -1.0]}),
        (Ranking(items=("a", "b"), scores=(2.0, 1.0)), "a, b",
         {"type": "ranking", "items": ["a", "b"], "scores": [2.0, 1.0]}),
    ],
)  # fmt: skip
def test_each_kind_goes_into_json_and_back(prediction, read, data):
    assert (str(prediction), prediction.to_json()) == (read, data)
    assert prediction_from_json(json.loads(json.dumps(data))) == prediction


def test_what_a_generated_answer_knows_more_is_not_kept():
    answer = Answer(text="two", prompt_tokens=7, completion_tokens=2)
    assert answer.to_json() == {"type": "text", "text": "two", "finish_reason": "stop"} and str(answer) == "two"
    assert prediction_from_json(answer.to_json()) == Text(text="two")


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (None, "must be an object with a type, got None"),
        ({"text": "x"}, "must be an object with a type"),
        ({"type": "txet", "text": "x"}, "unknown type of a prediction 'txet'. Did you mean 'text'?"),
        ({"type": "text"}, "of type text must have valid fields, but `text` is invalid: Field required"),
        (
            {"type": "text", "text": "x", "tokens": 1},
            "of type text must have valid fields, but `tokens` is invalid: Unexpected",
        ),
        (
            {"type": "text", "text": 5},
            "of type text must have valid fields, but `text` is invalid: Input should be a valid string",
        ),
        (
            {"type": "text", "text": "x", "finish_reason": "end"},
            "of type text must have valid fields, but `finish_reason` is invalid: Input should be 'stop'",
        ),
        (
            {"type": "number", "value": float("nan")},
            "of type number must have valid fields, but `value` is invalid: Input should be a finite number",
        ),
        (
            {"type": "number", "value": "1"},
            "of type number must have valid fields, but `value` is invalid: Input should be a valid number",
        ),
        (
            {"type": "label", "label": "a", "scores": {"a": float("inf")}},
            "of type label must have valid fields, but `scores.a` is invalid: Input should be",
        ),
        (
            {"type": "boxes", "boxes": [{"x1": 0}]},
            "of type boxes must have valid fields, but `boxes.0.y1` is invalid: Field required",
        ),
        ({"type": "ranking", "items": ["a"], "scores": []}, "one score an item, got 1 items and 0 scores"),
    ],
)
def test_what_is_no_prediction_is_one_clear_error(data, message):
    with pytest.raises(DataError) as caught:
        prediction_from_json(data)
    assert message in str(caught.value)


def test_a_number_that_is_not_finite_is_not_written():
    with pytest.raises(DataError, match="must hold finite numbers, got nan"):
        Number(value=float("nan")).to_json()
