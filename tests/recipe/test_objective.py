"""The recipe's ``objective``: by default the task's own, one or several, and what does not go together."""

import json

import pytest

from finetune.adapters.manifest import canonical_json, sha256_hex
from finetune.core.old_names import RECIPE, earlier_names
from finetune.errors import RecipeError
from finetune.recipe import parse_recipe
from finetune.recipe.published import published_recipe
from tests.recipe.test_schema import GOOD, check


def recipe(objective=None, **changes):
    named = {} if objective is None else {"objective": objective}
    return parse_recipe({**GOOD, **named, **changes}, source="mine.yaml")


def test_a_recipe_that_names_none_has_the_tasks_own():
    (section,) = recipe().objectives
    assert (section.name, section.weight) == ("cross_entropy", 1.0)
    (section,) = recipe(task={"name": "contrastive"}, model={"name_or_path": "some/hub-id"}).objectives
    assert section.name == "contrastive"


def test_a_recipe_that_names_none_keeps_its_digest():
    """As computed before a recipe could name an objective: unfinished runs go on, and manifests stay true."""
    assert sha256_hex(canonical_json(earlier_names(recipe().identity(), RECIPE))) == DIGEST
    assert "objective" not in published_recipe(recipe())
    assert "objective" not in json.loads(recipe().model_dump_json())


DIGEST = "446cbfad6d6792e2944f13758c4fd4fa95430a92f08d5b397bbf658e2185e918"


@pytest.mark.parametrize("named", [{"name": "cross_entropy"}, [{"name": "cross_entropy", "weight": 1.0}]])
def test_the_tasks_own_is_the_same_recipe_whether_it_is_named_or_not(named):
    assert recipe(named).identity() == recipe().identity()
    assert recipe(named).objectives == recipe().objectives
    assert check({**GOOD, "objective": named}) == []


@pytest.mark.parametrize(
    ("objective", "message"),
    [
        ({"name": "cross_entrop"}, "mine.yaml: unknown objective.name 'cross_entrop'. "
         r"Did you mean 'cross_entropy'\? Allowed: contrastive, cross_entropy."),
        ([{"name": "cross_entropy"}, {"name": "kl"}], "mine.yaml: unknown objective.name 'kl'"),
        ({"name": "cross_entropy", "weigth": 2.0}, r"objective.weigth: unknown key. Did you mean 'weight'\? Allowed "
         "here: name, weight."),
        ({"name": "cross_entropy", "weight": 0.0}, "objective.weight: Input should be greater than 0. Got 0.0."),
        ({"name": "cross_entropy", "weight": float("inf")}, "objective.weight: Input should be a finite number"),
        ({"name": "cross_entropy", "weight": 2.0}, "objective: the weight of a single objective must be "
         "1, got 2 for cross_entropy. Remove weight, and set train.learning_rate"),
        ([], "objective: .* at least 1 item"),
        ({"weight": 1.0}, "objective: name must be one of contrastive, cross_entropy, got nothing"),
        ([{"name": "cross_entropy"}] * 2, "objective: an objective must be unique, but 'cross_entropy' is given twice"),
        ([{"name": "contrastive"}, {"name": "cross_entropy"}], "objective: contrastive must be the only objective, "
         "got contrastive, cross_entropy: its loss depends on all rows of an optimizer step, .* Remove it or the o"),
        ({"name": "contrastive"}, "mine.yaml: objective contrastive cannot be used with task vqa: the objective "
         "takes pair_embeddings, but the task returns token_logits. Allowed with this task: cross_entropy."),
    ],
)  # fmt: skip
def test_what_does_not_go_is_refused_with_the_reason(objective, message):
    with pytest.raises(RecipeError, match=message):
        recipe(objective)


def test_cross_entropy_does_not_go_with_a_dual_encoders_task():
    with pytest.raises(RecipeError, match="cross_entropy cannot be used with task contrastive: .* task: contrastive"):
        recipe({"name": "cross_entropy"}, task={"name": "contrastive"})
