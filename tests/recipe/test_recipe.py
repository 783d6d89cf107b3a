"""Recipes: strict, helpful, and every YAML in the project is one."""

import json
import re
from pathlib import Path

import pytest

from finetune.errors import RecipeError
from finetune.recipe import TowerTargets, load_recipe, parse_recipe

CONFIGS = sorted((Path(__file__).parents[2] / "recipes" / "configs").rglob("*.yaml"))
GOOD = """
name: brain
domain: medical
model: {name_or_path: pocket}
method: {name: lora, r: 8, towers: {language: all-linear, projector: {target_modules: [fc], r: 4}}}
data: {source: jsonl, root: "here"}
train: {epochs: 2, learning_rate: 1e-3}
"""


@pytest.fixture
def write(tmp_path):
    def write(text):
        path = tmp_path / "r.yaml"
        path.write_text(text)
        return path

    return write


def test_a_good_recipe(write):
    recipe = load_recipe(write(GOOD), ["seed=3", "train.learning_rate=5e-4", "data.max_rows={train: 10}"])
    assert (recipe.seed, recipe.train.learning_rate, recipe.data.max_rows) == (3, 5e-4, {"train": 10})
    assert recipe.method[0].towers.projector.r == 4
    assert recipe.method[0].towers.vision.target_modules == "none"
    with pytest.raises(Exception, match="frozen"):
        recipe.seed = 4


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("train.learningrate=1", "train.learningrate: unknown key. Did you mean 'learning_rate'?"),
        (
            "method.towers.visio=none",
            r"method.towers.visio: the base has no such tower. Did you mean 'vision'\? It has language, projector, v",
        ),
        ("method.towers.langage=none", r"method.towers.langage: .* Did you mean 'language'\?"),
        (
            "method.towers.fusion={rank: 4}",
            "method.towers.fusion.rank: unknown key. Allowed here: target_modules, layers, r",
        ),
        ("method.name=lorra", r"r.yaml: unknown method.name 'lorra'. Did you mean 'lora'\?"),
        ("data.source=json", "'json': use data.source=jsonl, with one JSON object a line"),
        ("train.batch_size=many", "train.batch_size: .*integer.*Got 'many'"),
        ("train.batch_size=0", "train.batch_size: .*greater than or equal to 1"),
        ("train.max_steps=5", "exactly one of epochs and max_steps must be set, got epochs 2 and max_steps 5"),
        ("task.question_template=hello", "must hold {question} exactly once, got 'hello'"),
        ("adapter.publish=Brain", "adapter.publish"),
        ("name=A b", "name: "),
        ("seed", "an override must have the form key.subkey=value, got 'seed'"),
        ("name.x=1", "override 'name.x=1': name must be a section, got 'brain'"),
        ("data.root=null", "data.root"),
    ],
)
def test_a_wrong_key_or_value_is_named(write, override, message):
    with pytest.raises(RecipeError, match=message):
        load_recipe(write(GOOD), [override])


def test_all_mistakes_are_reported_at_once(write):
    with pytest.raises(RecipeError) as caught:
        load_recipe(write(GOOD), ["train.epoch=1", "seed=x"])
    assert "train.epoch" in str(caught.value) and "seed" in str(caught.value)


CLIP = {"model_type": "clip"}
LLAVA = {"model_type": "llava"}
PROMPT = "method={name: prompt_tuning}"


@pytest.mark.parametrize(
    ("config", "overrides", "message"),
    [
        (
            CLIP,
            [],
            "vqa cannot be used with clip: .*, but clip is dual_encoder. Set task.name to contrastive,",
        ),
        (
            CLIP,
            ["task.name=contrastive", PROMPT],
            r"prompt_tuning cannot be used with clip: .*Set method: {name: lora}",
        ),
        (
            LLAVA,
            ["task.name=contrastive"],
            "contrastive cannot be used with llava: .*llava is generative. Set task.name to classify or vqa,",
        ),
        ({"model_type": "mistral3"}, ["task.name=contrastive"], "task contrastive cannot be used with mistral3"),
        ({"model_type": "gemma3"}, [], "lora.towers.projector cannot be used with gemma3: .*full_modules"),
        (LLAVA, ["model.quantization=8bit", "method.use_dora=true"], "lora.use_dora cannot be used with 8bit: "),
    ],
)
def test_what_cannot_be_combined_is_refused_with_the_nearest_choice(write, tmp_path, config, overrides, message):
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(RecipeError, match=message):
        load_recipe(write(GOOD), [f"model.name_or_path={tmp_path}", *overrides])


def test_what_can_be_combined(write, tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(CLIP))
    base = f"model.name_or_path={tmp_path}"
    recipe = load_recipe(write(GOOD), [base, "task={name: contrastive, text_template: 'a {label}'}"])
    assert recipe.task.text_of("hat") == "a hat"
    allowed = "name, metrics, answer_normalization, decimal_separator, text_template"
    with pytest.raises(RecipeError, match=f"task.max_new_tokens: unknown key. Allowed here: {allowed}"):
        load_recipe(write(GOOD), [base, "task={name: contrastive, max_new_tokens: 4}"])
    with pytest.raises(RecipeError, match="task.text_templat: unknown key. Did you mean 'text_template'"):
        load_recipe(write(GOOD), [base, "task={name: contrastive, text_templat: x}"])
    assert load_recipe(write(GOOD), ["model.name_or_path=some/hub-id", "task.name=contrastive"]), "not known yet"


def test_a_tower_of_a_base_that_is_not_known_yet(write):
    recipe = load_recipe(
        write(GOOD), ["model.name_or_path=some/hub-id", "method.towers.fusion={target_modules: [q], r: 2}"]
    )
    (lora,) = recipe.method
    assert lora.towers.of("fusion").r == 2 and lora.adapted_towers == {"language", "projector", "fusion"}
    assert parse_recipe(recipe.model_dump(mode="json"), source="again").identity() == recipe.identity()


@pytest.mark.parametrize(
    ("wanted", "towers", "reason"),
    [
        ({}, ["language", "vision"], None),
        ({"fusion": "all-linear"}, ["vision", "fusion"], None),  # the default of language is not demanded
        (
            {"fusion": "all-linear"},
            ["language", "vision"],
            r".fusion: the base has no such tower. Did you mean 'vision'\? It has language, vision.",
        ),
        (
            {"projector": "all-linear"},
            ["language", "vision"],
            ".projector: the base has no such tower. It has language, vision.",
        ),
        (
            {"language": ["q_proj"], "fusion": "all-linear"},
            ["vision", "fusion"],
            ".language: the base has no such tower.",
        ),
        (
            {},
            ["vision", "fusion"],
            r": at least one tower of the base must be adapted, got none for every tower \(vision, fusion\).",
        ),
    ],
)
def test_towers_that_a_base_has_or_lacks(wanted, towers, reason):
    found = TowerTargets.model_validate(wanted).why_not(towers)
    assert (found is None) == (reason is None)
    assert reason is None or re.match(reason, found)


def test_environment_variables(write, monkeypatch):
    path = write(GOOD.replace("here", "${SOME_ROOT}/x"))
    monkeypatch.delenv("SOME_ROOT", raising=False)
    with pytest.raises(RecipeError, match=r"data.root: the environment variable SOME_ROOT is not set. Set it, or"):
        load_recipe(path)
    assert load_recipe(path, ["data.root=elsewhere"]).data.root == "elsewhere"
    monkeypatch.setenv("SOME_ROOT", "/data")
    assert load_recipe(path).data.root == "/data/x"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("- 1", r"a recipe must be a mapping with the keys .*, got \[1\]"),
        ("a: [", "the recipe must be valid YAML"),
        (GOOD + "seed: 1\nseed: 2\n", "a key must be unique, but 'seed' is given twice"),
        (GOOD.replace("domain: medical", ""), "domain: this key is missing and has no default"),
    ],
)
def test_a_broken_file(write, text, message):
    with pytest.raises(RecipeError, match=message):
        load_recipe(write(text))


def test_a_missing_file(tmp_path):
    with pytest.raises(RecipeError, match="none.yaml: the recipe cannot be read: No such file or directory. Check the"):
        load_recipe(tmp_path / "none.yaml")


def test_identity_leaves_out_where_things_lie_and_how_a_run_is_kept(write):
    path = write(GOOD)
    a, b = load_recipe(path), load_recipe(path, ["data.root=there", "model.name_or_path=/x", "train.output_dir=/y"])
    assert a.identity() == b.identity()
    kept = [
        "train.resume=never",
        "train.save_steps=5",
        "train.trackers=[wandb]",
        "train.num_workers=2",
        "train.num_threads=1",
    ]
    assert load_recipe(path, kept).identity() == a.identity()
    assert a.identity() != load_recipe(path, ["seed=1"]).identity()


@pytest.mark.parametrize("path", CONFIGS, ids=lambda p: f"{p.parent.name}/{p.stem}")
def test_every_config_is_a_recipe_with_its_command(path, monkeypatch):
    monkeypatch.setenv("FINETUNE_BASE", "/base")
    monkeypatch.setenv("FINETUNE_DATA", "/data")
    recipe = load_recipe(path)
    assert recipe.domain == path.parent.name
    assert recipe.adapter.publish
    header = path.read_text().split("name:")[0]
    assert f"./launch.sh {path.relative_to(path.parents[3]).as_posix()}" in header


@pytest.mark.parametrize(
    ("metrics", "message"),
    [
        (
            "[exact_mach]",
            r"r.yaml: unknown metric \(task.metrics\) 'exact_mach'. Did you mean 'exact_match'\?",
        ),
        ("[exact_match, exact_match]", "task.metrics: a metric must be unique, but 'exact_match' is given twice"),
        ("[]", "metrics: .*at least 1 item"),
    ],
)
def test_a_metric_that_there_is_not_is_refused(write, metrics, message):
    with pytest.raises(RecipeError, match=message):
        load_recipe(write(GOOD), [f"task.metrics={metrics}"])


def test_metrics_that_are_not_named_change_no_digest(write):
    assert "metrics" not in load_recipe(write(GOOD)).identity()["task"]
    assert load_recipe(write(GOOD), ["task.metrics=[exact_match]"]).task.metrics == ["exact_match"]
