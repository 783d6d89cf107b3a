"""Earlier names in recipes and saved files: the whole grammar of the table, and the error for both names."""

import copy

import pytest

from finetune.core.old_names import METRICS, RECIPE, RUN, current_key, current_names, earlier_names, other_names
from finetune.errors import DataError

TABLE = {"a.old": "new", "many.*.old": "new", "list[].old": "new", "list[].name=before": "after", "top": "above"}


def renamed(data):
    before = copy.deepcopy(data)
    found = current_names(data, TABLE, source="file", error=DataError)
    assert data == before, "the argument stays as it is"
    return found


@pytest.mark.parametrize(
    ("data", "expected"),
    [
        ({"a": {"x": 1, "old": 2, "y": 3}}, {"a": {"x": 1, "new": 2, "y": 3}}),
        ({"a": {"old": None}}, {"a": {"new": None}}),
        ({"a": {"new": 1}, "b": {"old": 2}}, {"a": {"new": 1}, "b": {"old": 2}}),
        ({"many": {"b": {"old": 1}, "c": {"old": 2}, "d": 3}}, {"many": {"b": {"new": 1}, "c": {"new": 2}, "d": 3}}),
        ({"many": {"old": {"old": 1}}}, {"many": {"old": {"new": 1}}}),
        ({"list": [{"old": 1}, {"name": "before"}, "old"]}, {"list": [{"new": 1}, {"name": "after"}, "old"]}),
        ({"list": {"name": "before", "old": 1}}, {"list": {"name": "after", "new": 1}}),
        ({"list": {"name": ["before"]}}, {"list": {"name": ["before"]}}),
        ({"top": 1}, {"above": 1}),
        ({"a": "old", "many": None, "list": 5}, {"a": "old", "many": None, "list": 5}),
        ({"list": [[{"old": 1}]]}, {"list": [[{"old": 1}]]}),
        ({"a": [{"old": 1}]}, {"a": [{"old": 1}]}),
        ({"a": {"source": "own", "old": 1}}, {"a": {"source": "own", "old": 1}}),
        ({"a": {"source": "own", "old": 1, "new": 2}}, {"a": {"source": "own", "old": 1, "new": 2}}),
        ({"a": {"source": "jsonl", "old": 1}}, {"a": {"source": "jsonl", "new": 1}}),
        ({1: 2}, {1: 2}),
        (None, None),
        ("old", "old"),
    ],
)
def test_an_earlier_name_becomes_the_present_one(data, expected):
    found = renamed(data)
    assert found == expected and str(found) == str(expected), "the order of keys stays too"


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ({"a": {"old": 1, "new": 1}}, "^file: a.new must be given once, but its earlier name a.old is given too. R"),
        ({"many": {"x": {"new": 1, "old": 2}}}, "^file: many.x.new must be given once, .* Remove many.x.old.$"),
        ({"many": {"\n": {"new": 1, "old": 2}}}, r"^file: 'many.\\n.new' must be given once"),
        (
            {"top": 1, "above": 2},
            "^file: above must be given once, but its earlier name top is given too. Remove top",
        ),
    ],
)
def test_both_names_are_an_error(data, message):
    with pytest.raises(DataError, match=message):
        renamed(data)


@pytest.mark.parametrize(
    "data",
    [
        {"a": {"x": 1, "old": 2, "y": 3}, "many": {"b": {"old": 1}, "c": 4}},
        {"list": [{"old": 1}, {"name": "before"}], "top": None},
        {"a": {"other": 1}},
        None,
    ],
)
def test_a_digest_sees_the_earlier_names(data):
    assert earlier_names(renamed(data), TABLE) == earlier_names(data, TABLE) == data


@pytest.mark.parametrize(
    ("key", "expected"),
    [
        ("a.old", "a.new"),
        ("many.x.old", "many.x.new"),
        ("many.old", "many.old"),
        ("a.old.x", "a.old.x"),
        ("old", "old"),
        ("list.name", "list.name"),
    ],
)
def test_a_dotted_key_gets_the_present_name(key, expected):
    assert current_key(key, TABLE) == expected


@pytest.mark.parametrize(
    ("key", "others"),
    [("a.old", ["new"]), ("a.new", ["old"]), ("many.x.new", ["old"]), ("many.new", []), ("top", ["above"]), ("x", [])],
)
def test_a_dotted_key_has_other_names(key, others):
    assert other_names(key, TABLE) == others


@pytest.mark.parametrize("table", [RECIPE, RUN, METRICS])
def test_a_value_that_holds_itself_or_is_deep_is_read(table):
    itself: list = []
    itself.append(itself)
    for value in (itself, {"data": itself, "method": itself, "recipe": itself}):
        current_names(value, table, source="file", error=DataError)
    shared: list = ["x"]
    for _ in range(60):
        shared = [shared, shared]
    current_names({"data": shared, "method": shared}, table, source="file", error=DataError)


def test_the_present_names_of_a_recipe_are_none_of_the_earlier_ones():
    earlier = {path.rpartition(".")[2].rpartition("=")[2] for path in RECIPE}
    assert not earlier & set(RECIPE.values())
