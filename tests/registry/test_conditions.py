import pytest

from finetune.errors import ConditionError
from finetune.registry.conditions import Condition

METRICS = {
    "before": {"exact_match": 0.25},
    "after": {"exact_match": 0.7, "loss": 1e-9, "recall@1": 1, "by.kind": {"color": 0.5}, "done": True, "note": "x"},
}


@pytest.mark.parametrize(
    ("text", "holds"),
    [
        ("after.exact_match>=0.70", True),
        ("after.exact_match>0.7", False),
        (" after.exact_match <= 0.7 ", True),
        ("after.exact_match<0.7", False),
        ("after.exact_match==0.7", True),
        ("before.exact_match>=.7", False),
        ("after.loss<1e-6", True),
        ("after.loss>-1", True),
        ("after.recall@1>=1", True),
        ("after.by.kind.color==0.5", True),
        ("after.done>=0", False),
        ("after.note>=0", False),
        ("after>=0", False),
        ("exact_match>=0", False),
    ],
)
def test_a_condition_holds_where_the_number_is_there_and_is_right(text, holds):
    assert Condition.parse(text).holds(METRICS) is holds


@pytest.mark.parametrize(
    "text",
    ["", "after.x", "after.x>=", ">=1", "after.x=1", "after.x=>1", "after.x!=1", "after.x>=nan", "after.x>=inf",
     "after.x>=1e999", "after.x>=one", "after x>=1", "after.x>=1>=2", "a\x1b>=1", "a" * 101 + ">=1"],
)  # fmt: skip
def test_what_is_no_condition_is_refused_with_the_form(text):
    with pytest.raises(ConditionError, match="is no condition: give the path of a metric, one of >=, <=, ==, >, <,"):
        Condition.parse(text)


def test_what_was_found_is_said():
    assert Condition.parse("after.exact_match >= 0.80").describe(METRICS) == "after.exact_match>=0.8: it is 0.7"
    assert Condition.parse("after.exact_mach>=0.8").describe(METRICS) == (
        "after.exact_mach>=0.8: there is no such metric. Did you mean 'after.exact_match'? There are: "
        "after.exact_match, after.loss, after.recall@1, before.exact_match, after.by.kind.color"
    )
    assert Condition.parse("x>=1").describe({}).endswith("There are: none")
    many = {"a" * 80 + str(n): n for n in range(100)}
    assert len(Condition.parse("b" * 100 + ">=123456.7").describe(many)) <= 256


@pytest.mark.parametrize(
    "metrics", [None, 0.7, "0.7", [0.7], {"after": 0.7}, {"after": [0.7]}, {"after": {"exact_match": "0.7"}},
                {"after": {"exact_match": True}}, {"after": {"exact_match": float("nan")}},
                {"after": {"exact_match": 10**400}}],
)  # fmt: skip
def test_metrics_of_another_type_meet_nothing(metrics):
    condition = Condition.parse("after.exact_match>=0.1")
    assert not condition.holds(metrics) and "there is no such metric" in condition.describe(metrics)


def test_a_condition_written_out_is_read_back():
    condition = Condition.parse("after.loss < -0.125")
    assert str(condition) == "after.loss<-0.125" and Condition.parse(str(condition)) == condition


def test_the_metrics_of_the_whole_split_are_named_before_those_of_its_kinds():
    kinds = {f"kind {n}": {"exact_match": 0.1, "majority": 0.2, "n": 4} for n in range(40)}
    scores = {"exact_match": 0.5, "majority": 0.25, "blank_image": 0.1, "n": 160, "by_kind": kinds}
    said = Condition.parse("foo>=0.7").describe({"after": scores, "before": scores, "test": scores})
    assert (
        "There are: test.blank_image, test.exact_match, test.majority, test.n, after.blank_image, after.exact" in said
    )
    assert said.index("before.n") < said.index("by_kind") and len(said) <= 256
    said = Condition.parse("exact_match>=0.7").describe({"after": scores, "test": scores})
    assert "Did you mean 'test.exact_match'? There are: test.blank_image" in said
