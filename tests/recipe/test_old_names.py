"""Recipes with keys of earlier releases: read under the present names, from a file, an override or plain data."""

from typing import Literal

import pytest

from finetune import plugins
from finetune.errors import RecipeError
from finetune.recipe import RowsSection, load_recipe, parse_recipe

RECIPE = """
name: brain
domain: medical
model: {name_or_path: pocket}
method: {name: lora}
data: {source: jsonl, root: here, KEY: tumor}
train: {epochs: 2}
"""
MIX = """
data: {source: mix, sources: {a: {data: {source: jsonl, root: a, KEY: tumor}}, b: {data: {source: jsonl, root: b}}}}
"""


class Own(RowsSection):
    """A source of a plug-in with a key of its own that has an earlier name."""

    source: Literal["own"]
    kind: str = "none"


class OwnSource:
    Config = Own


@pytest.fixture
def write(tmp_path):
    def write(key, text=RECIPE):
        path = tmp_path / "recipe.yaml"
        path.write_text(text.replace("KEY", key))
        return path

    return write


@pytest.fixture
def own_source():
    plugins.register("sources", "own", OwnSource)
    yield
    plugins.unregister("sources", "own")


def test_a_recipe_with_the_earlier_key_is_the_one_with_the_present_key(write):
    old, new = load_recipe(write("kind")), load_recipe(write("question_type"))
    assert old == new and new.data.question_type == "tumor"
    assert "kind" not in old.model_dump()["data"]


def test_the_sources_of_a_mix(write):
    text = RECIPE.replace("data: {source: jsonl, root: here, KEY: tumor}", MIX)
    recipe = load_recipe(write("kind", text))
    assert recipe == load_recipe(write("question_type", text))
    assert recipe.data.part("a").question_type == "tumor"
    changed = load_recipe(write("kind", text), ["data.sources.b.data.kind=place"])
    assert [changed.data.part(name).question_type for name in "ab"] == ["tumor", "place"]


@pytest.mark.parametrize("key", ["kind", "question_type"])
@pytest.mark.parametrize("override", ["data.kind=place", "data.question_type=place"])
def test_an_override_with_either_name_replaces_the_value_of_the_file(write, key, override):
    assert load_recipe(write(key), [override]).data.question_type == "place"


def test_an_override_of_the_whole_section(write):
    assert load_recipe(write("kind"), ["data={source: jsonl, root: x, kind: place}"]).data.question_type == "place"


def test_an_override_after_one_of_the_whole_section(write):
    whole = "data={source: jsonl, root: x, kind: place}"
    assert load_recipe(write("kind"), [whole, "data.kind=tumor"]).data.question_type == "tumor"


@pytest.mark.parametrize("overrides", [["data.kind=flat", "data={source: own, kind: flat}"], ["data.source=own"]])
def test_an_override_of_the_source(write, own_source, overrides):
    text = RECIPE.replace("root: here, KEY: tumor", "kind: flat")
    assert load_recipe(write("", text), overrides).data.kind == "flat"


def test_both_names_are_one_clear_error(write):
    path = write("question_type: place, kind")
    with pytest.raises(RecipeError) as caught:
        load_recipe(path)
    assert str(caught.value) == (
        f"{path}: data.question_type must be given once, but its earlier name data.kind is given too. Remove data.kind."
    )


def test_a_key_of_a_plug_in_keeps_its_name(write, own_source):
    text = RECIPE.replace("data: {source: jsonl, root: here, KEY: tumor}", "data: {source: own, kind: round}")
    assert load_recipe(write("", text)).data.kind == "round"
    assert load_recipe(write("", text), ["data.kind=flat"]).data.kind == "flat"


def test_a_source_without_question_types_refuses_the_key():
    raw = {"name": "a", "domain": "b", "model": {"name_or_path": "pocket"}, "method": {"name": "lora"}}
    raw |= {"data": {"source": "procedural", "name": "medical", "kind": "x"}, "train": {"epochs": 1}}
    with pytest.raises(RecipeError, match="^here: data.kind: unknown key. Allowed here: source"):
        parse_recipe(raw, source="here")
