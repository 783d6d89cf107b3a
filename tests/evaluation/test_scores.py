"""Scores as JSON: what is written is read back, and nothing else is."""

import json

import pytest

from finetune.errors import DataError
from finetune.evaluation.scores import Scores, Value
from tests.scores import scores_json


def test_scores_are_read_back_as_they_were():
    data = scores_json(0.75, question_types={"color": 0.5})
    assert Scores.from_json(json.loads(json.dumps(data))).to_json() == data
    assert data["by_question_type"]["color"].keys() == {"values", "baselines", "n", "truncated"}
    assert data["values"]["exact_match"] == {
        "value": 0.75, "interval": [0.0, 1.0], "n": 40, "unit": None, "higher_is_better": True,
    }  # fmt: skip


def test_scores_with_the_earlier_name_are_read():
    data = scores_json(0.75, question_types={"color": 0.5})
    old = {"by_kind" if key == "by_question_type" else key: value for key, value in data.items()}
    assert Scores.from_json(old).to_json() == data


def put(value, *path):
    def change(data):
        for key in path[:-1]:
            data = data[key]
        data[path[-1]] = value

    return change


VALUE = ("values", "exact_match")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (put(1, "color"), r"scores must be an object with the keys baselines, by_question_type, .* got .*'color'"),
        (lambda data: data.pop("n"), "scores must be an object with the keys baselines, by_question_type, n"),
        (put([], "values"), r"scores.values must be an object, got \[\]"),
        (put(float("nan"), *VALUE, "value"), "scores.values.exact_match.value must be a finite number, got nan"),
        (put(True, *VALUE, "value"), "must be a finite number, got True"),
        (put([0.1], *VALUE, "interval"), r"interval must be \[LOW, HIGH\] or null, got \[0.1\]"),
        (put(["a", 1], *VALUE, "interval"), "interval must be a finite number, got 'a'"),
        (put(1.5, *VALUE, "n"), "exact_match.n must be a whole number from 0, got 1.5"),
        (put(-1, "truncated"), "scores.truncated must be a whole number from 0, got -1"),
        (put(5, *VALUE, "unit"), "unit must be a text or null, got 5"),
        (put(1, *VALUE, "higher_is_better"), "higher_is_better must be true or false, got 1"),
        (
            put({}, "by_question_type", "color", "by_question_type"),
            "by_question_type.color must be an object with the keys",
        ),
        (put({}, "by_kind"), "scores: by_question_type must be given once, but its earlier name by_kind is given too"),
    ],
)
def test_what_is_not_of_this_form_is_refused(change, message):
    data = scores_json(0.75, question_types={"color": 0.5})
    change(data)
    with pytest.raises(DataError, match=message):
        Scores.from_json(data)


def test_a_value_is_shown_with_its_unit():
    value = Value(value=2.0, interval=None, n=1, unit="mm", higher_is_better=True)
    assert str(value) == "2.000 mm"
