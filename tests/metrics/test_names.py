"""The names of what was measured: the same of a manifest, of a summary and of what earlier releases wrote."""

import pytest

from finetune.adapters.manifest_schema_2 import metrics_from_schema_2
from finetune.metrics.names import named_values, summarized
from tests.scores import scores_json

OLD = {"exact_match": 0.75, "majority": 0.5, "blank_image": 0.25, "n": 4}
METRICS = {
    "test": scores_json(0.75, n=4, question_types={"caption": 0.9, "majority": 0.1}),
    "base": scores_json(0.5, n=4),
}
WHOLE = {
    "test.exact_match": 0.75, "test.majority.exact_match": 0.5, "test.blank_image.exact_match": 0.25, "test.n": 4.0,
    "test.truncated": 0.0, "base.exact_match": 0.5, "base.majority.exact_match": 0.5,
    "base.blank_image.exact_match": 0.25, "base.n": 4.0, "base.truncated": 0.0,
}  # fmt: skip


def test_everything_has_one_name():
    caption = {
        "test.caption.exact_match": 0.9, "test.caption.majority.exact_match": 0.5,
        "test.caption.blank_image.exact_match": 0.25, "test.caption.n": 4.0, "test.caption.truncated": 0.0,
    }  # fmt: skip
    named = named_values(METRICS)
    assert WHOLE.items() <= named.items(), "a question type called majority does not hide the baseline"
    assert caption.items() <= named.items() and all(isinstance(value, float) for value in named.values())


def test_a_summary_keeps_what_is_of_all_rows_under_the_same_names():
    assert named_values(summarized(METRICS)) == WHOLE
    assert summarized(summarized(METRICS)) == summarized(METRICS)


@pytest.mark.parametrize(
    "metrics",
    [None, 0.7, "0.7", [0.7], {"test": 0.7}, {"test": [0.7]}, {"test": {"n": "4"}}, {"test": {"n": True}},
     {"test": {"n": float("nan")}}, {"test": {"n": 10**400}}, {"test": {"values": [1]}},
     {"test": {"by_question_type": [5]}}, {"test": {"values": {"f1": 0.5}}},
     {"test": {"values": {"f1": {"value": "high"}}}}, {"test": {"baselines": {"x": 1}}}],
)  # fmt: skip
def test_what_is_no_number_has_no_name(metrics):
    assert named_values(metrics) == {}


def test_scores_of_schema_2_are_read_under_todays_names():
    old = {
        "before": OLD | {"blank_image": None},
        "after": OLD | {"interval": [0.5, 1.0], "by_kind": {"color": {"exact_match": 0.5, "majority": 0.5, "n": 2}}},
    }
    new = metrics_from_schema_2(old)
    assert new["test"]["values"] == {
        "exact_match": {"value": 0.75, "interval": [0.5, 1.0], "n": 4, "unit": None, "higher_is_better": True}
    }
    assert named_values(new) == {
        "base.exact_match": 0.75, "base.majority.exact_match": 0.5, "base.n": 4.0,
        "test.exact_match": 0.75, "test.majority.exact_match": 0.5, "test.blank_image.exact_match": 0.25, "test.n": 4.0,
        "test.color.exact_match": 0.5, "test.color.majority.exact_match": 0.5, "test.color.n": 2.0,
    }  # fmt: skip
    assert metrics_from_schema_2(new) == new, "what has today's form stays as it is"


def test_a_summary_that_schema_2_gave_is_that_of_the_manifest_it_was_made_of():
    old = {"before": OLD, "after": OLD | {"interval": [0.5, 1.0], "by_kind": {"color": OLD}, "note": "x"}}
    then = {who: {k: v for k, v in scores.items() if isinstance(v, int | float)} for who, scores in old.items()}
    assert summarized(metrics_from_schema_2(then)) == summarized(metrics_from_schema_2(old))
