import pytest

from finetune.errors import ConditionError
from finetune.metrics.names import named_values
from finetune.registry.log.conditions import Condition
from tests.scores import scores_json

VALUES = {
    "base.exact_match": 0.25,
    "test.exact_match": 0.7,
    "test.loss": 1e-9,
    "test.recall@1": 1.0,
    "test.color.exact_match": 0.5,
}


@pytest.mark.parametrize(
    ("text", "holds"),
    [
        ("test.exact_match>=0.70", True),
        ("test.exact_match>0.7", False),
        (" test.exact_match <= 0.7 ", True),
        ("test.exact_match<0.7", False),
        ("test.exact_match==0.7", True),
        ("base.exact_match>=.7", False),
        ("test.loss<1e-6", True),
        ("test.loss>-1", True),
        ("test.recall@1>=1", True),
        ("test.color.exact_match==0.5", True),
        ("test>=0", False),
        ("exact_match>=0", False),
    ],
)
def test_a_condition_holds_where_the_number_is_there_and_is_right(text, holds):
    assert Condition.parse(text).holds(VALUES) is holds


@pytest.mark.parametrize(
    "text",
    ["", "test.x", "test.x>=", ">=1", "test.x=1", "test.x=>1", "test.x!=1", "test.x>=nan", "test.x>=inf",
     "test.x>=1e999", "test.x>=one", "test x>=1", "test.x>=1>=2", "a\x1b>=1", "a" * 101 + ">=1"],
)  # fmt: skip
def test_what_is_no_condition_is_refused_with_the_form(text):
    with pytest.raises(
        ConditionError, match="a condition must be the name of a value, one of >=, <=, ==, >, <, and a number"
    ):
        Condition.parse(text)


@pytest.mark.parametrize(("text", "name"), [("after.exact_match>=0.7", "test"), ("before.by_kind.a.f1>0", "base")])
def test_a_name_of_release_0_1_is_refused_with_todays(text, name):
    with pytest.raises(
        ConditionError, match=f"the name of a metric must begin with test or base, got .*: use {name}[.]"
    ):
        Condition.parse(text)


def test_the_description_has_what_was_found():
    assert Condition.parse("test.exact_match >= 0.80").describe(VALUES) == "test.exact_match>=0.8: it is 0.7"
    assert Condition.parse("test.exact_mach>=0.8").describe(VALUES) == (
        "test.exact_mach>=0.8: there is no such metric. Did you mean 'test.exact_match'? There are: "
        "test.exact_match, test.loss, test.recall@1, base.exact_match, test.color.exact_match"
    )
    assert Condition.parse("x>=1").describe({}).endswith("There are: none")
    many = {"a" * 80 + str(n): n for n in range(100)}
    assert len(Condition.parse("b" * 100 + ">=123456.7").describe(many)) <= 256


def test_a_condition_written_out_is_read_back():
    condition = Condition.parse("test.loss < -0.125")
    assert str(condition) == "test.loss<-0.125" and Condition.parse(str(condition)) == condition


def test_the_metrics_of_the_whole_split_are_named_before_those_of_its_question_types():
    scores = scores_json(0.5, question_types={f"type {n}": 0.1 for n in range(40)})
    values = named_values({"base": scores, "test": scores})
    description = Condition.parse("foo>=0.7").describe(values)
    assert (
        "There are: test.exact_match, test.n, test.truncated, base.exact_match, base.n, base.truncated, test."
        in description
    )
    assert len(description) <= 256 and description.index("base.n") < description.index("type")
    assert "Did you mean 'test.exact_match'? There are: test.exact" in Condition.parse("exact_match>=0.7").describe(
        values
    )
