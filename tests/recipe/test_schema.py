"""The schema that editors check recipes by: current, true to the models, and named by every config."""

import re
from pathlib import Path

import pytest
from jsonschema import Draft202012Validator

from finetune.cli import main
from finetune.errors import RecipeError
from finetune.recipe import (
    AdapterSection,
    ContrastiveObjectiveSection,
    CrossEntropySection,
    FullModulesSection,
    HubData,
    JsonlData,
    LoraSection,
    ModelSection,
    PromptTuningSection,
    Recipe,
    TowerTarget,
    TrainSection,
    parse_recipe,
    read_value,
)
from finetune.recipe.schema import recipe_schema, schema_text
from finetune.tasks.contrastive import ContrastiveConfig
from finetune.tasks.vqa import VqaConfig

ROOT = Path(__file__).parents[2]
FILE = ROOT / "docs" / "recipe.schema.json"
CONFIGS = sorted((ROOT / "recipes" / "configs").rglob("*.yaml"))
GOOD = {
    "name": "brain",
    "domain": "medical",
    "model": {"name_or_path": "pocket"},
    "method": {"name": "lora", "towers": {"vision": "all-linear", "language": ["q_proj"], "projector": "none"}},
    "data": {"source": "jsonl", "root": "here"},
    "train": {"epochs": 2},
}


def changed(path: str, value) -> dict:
    """Return GOOD with the value at ``a.b`` replaced."""
    *sections, last = path.split(".")
    raw = {key: dict(part) if isinstance(part, dict) else part for key, part in GOOD.items()}
    place = raw
    for section in sections:
        place[section] = dict(place.get(section, {}))
        place = place[section]
    place[last] = value
    return raw


VALIDATOR = Draft202012Validator(recipe_schema())


def check(raw) -> list[str]:
    """What is wrong, each with its place, down to why every alternative did not fit."""
    found, open_ = [], list(VALIDATOR.iter_errors(raw))
    while open_:
        error = open_.pop()
        found.append(f"{error.json_path}: {error.message}")
        open_ += error.context
    return found


def test_the_file_is_current(capsys, tmp_path):
    assert FILE.read_text(encoding="utf-8") == schema_text(), "run `finetune schema docs/recipe.schema.json`"
    assert main(["schema"]) == 0
    assert capsys.readouterr().out == schema_text()
    assert main(["schema", str(tmp_path / "there.json")]) == 0
    assert (tmp_path / "there.json").read_text(encoding="utf-8") == schema_text()


@pytest.mark.parametrize("path", CONFIGS, ids=lambda p: f"{p.parent.name}/{p.stem}")
def test_every_config_names_the_schema_and_fulfils_it(path):
    text = path.read_text(encoding="utf-8")
    first, _, _ = text.partition("\n")
    word, _, where = first.partition("$schema=")
    assert word == "# yaml-language-server: ", "the first line tells the editor where the schema is"
    assert (path.parent / where).resolve() == FILE
    # Editors too read 1e-3 as a number, which plain YAML 1.1 does not.
    assert check(read_value(text, source=str(path))) == []


@pytest.mark.parametrize(
    ("path", "value"),
    [
        ("seed", 3),
        ("train.learning_rate", 1),
        ("train.eval_steps", None),
        ("data.max_rows", {"train": 5}),
        ("method.towers", {"vision": {"target_modules": ["fc"], "r": 4}}),
        ("data", {"source": "procedural", "name": "retail"}),
        ("adapter", {"publish": "medical/brain", "aliases": ["prod"]}),
        ("objective", {"name": "cross_entropy"}),
    ],
)
def test_what_the_models_take_the_schema_takes(path, value):
    raw = changed(path, value)
    parse_recipe(raw, source="test")
    assert check(raw) == []


@pytest.mark.parametrize(
    ("path", "value", "problem"),
    [
        ("colour", 1, "'colour' was unexpected"),
        ("train.epoch", 1, r"\$.train: .*'epoch' was unexpected"),
        ("train.batch_size", 0, "0 is less than the minimum of 1"),
        ("train.batch_size", "8", "'8' is not of type 'integer'"),
        ("train.batch_size", True, "True is not of type 'integer'"),
        ("train.lr_scheduler_type", "cosin", "'cosin' is not one of"),
        ("method.lora_dropout", 1.0, "1.0 is greater than or equal to the maximum of 1"),
        ("method.name", "lorra", "'lora' was expected"),
        ("method.towers", {"fusion": {"target_modules": ["fc"], "rr": 4}}, "'rr' was unexpected"),
        ("method.towers", {"fusion": 3}, "3 is not valid under any of the given schemas"),
        ("method.towers", {"vision": 3}, "3 is not valid under any of the given schemas"),
        ("name", "A b", "'A b' does not match"),
        ("name", "a" * 65, "is too long"),
        ("model", {}, "'name_or_path' is a required property"),
        ("data", {"source": "jsonl"}, "'root' is a required property"),
        ("data.max_rows", {"trian": 5}, "'trian' is not one of"),
        ("adapter", {"aliases": [1]}, "1 is not of type 'string'"),
        ("objective", {"name": "cross_entropy", "weight": 0}, "0 is less than or equal to the minimum of 0"),
        ("objective", [{"name": "mse"}], "'cross_entropy' was expected"),
    ],
)
def test_what_the_models_refuse_the_schema_refuses(path, value, problem):
    raw = changed(path, value)
    with pytest.raises(RecipeError):
        parse_recipe(raw, source="test")
    assert re.search(problem, "\n".join(check(raw)))


@pytest.mark.parametrize("path", ["model.name_or_path", "data.root", "data.train", "train.output_dir"])
def test_a_variable_may_stand_for_a_place(path):
    assert check(changed(path, "${SOME_NAME}/x")) == []


def test_a_variable_stands_for_no_name_and_no_number():
    assert check(changed("seed", "${SEED}")) == ["$.seed: '${SEED}' is not of type 'integer'"]
    assert "'${NAME}' does not match" in check(changed("name", "${NAME}"))[0]


@pytest.mark.parametrize(
    "section",
    [
        AdapterSection,
        ContrastiveConfig,
        ContrastiveObjectiveSection,
        CrossEntropySection,
        HubData,
        JsonlData,
        LoraSection,
        ModelSection,
        FullModulesSection,
        PromptTuningSection,
        Recipe,
        TowerTarget,
        TrainSection,
        VqaConfig,
    ],
)
def test_every_field_is_described(section):
    described = {
        name
        for name, field in section.model_fields.items()
        # A section within is described by its own words.
        if field.description or name in ("model", "method", "data", "task", "train", "adapter")
    }
    assert described == set(section.model_fields)
