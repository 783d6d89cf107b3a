"""Manifests of schema 2 are read for ever: how an app asks, and what is compared, stays what it was."""

import json

import pytest

from finetune.adapters.manifest import AdapterManifest, canonical_json
from finetune.errors import ManifestError
from finetune.metrics.names import named_values
from tests.adapters.test_manifest_schema_1 import OLD, ONE
from tests.scores import scores_json

PROMPT = {
    **OLD["prompt"],
    "image_position": "last",
    "answer_normalization": "number",
    "decimal_separator": ",",
    "caption_question": "What is drawn?",
}
TRAINING = {**{key: value for key, value in OLD["training"].items() if key != "recipe"}, "recipe_digest": ONE}
SECOND = OLD | {"schema_version": 2, "prompt": PROMPT, "training": TRAINING}


def read(**changes):
    return AdapterManifest.parse(canonical_json(json.loads(json.dumps(SECOND | changes))))


def test_the_prompt_becomes_the_settings_of_the_task():
    assert read().task.model_dump(exclude={"metrics"}) == {
        "name": "vqa",
        "system_prompt": "Be brief.",
        "question_template": "Q: {question}",
        "image_position": "last",
        "max_new_tokens": 16,
        "caption_question": "What is drawn?",
        "answer_normalization": "number",
        "decimal_separator": ",",
    }


def test_what_is_read_can_be_written_as_todays():
    manifest = read()
    assert manifest.schema_version == 3
    assert AdapterManifest.parse(manifest.to_bytes()) == manifest


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"task": {"name": "vqa"}}, "schema 2: task belongs to a later schema"),
        ({"plugins": []}, "schema 2: plugins belongs to a later schema"),
        ({"prompt": PROMPT | {"generation": {"max_new_tokens": 4, "do_sample": True}}}, "task.do_sample: Extra"),
        ({"prompt": PROMPT | {"generation": {"max_new_tokens": 4, "num_beams": 5}}}, "task.num_beams: Extra"),
        ({"prompt": PROMPT | {"generation": {"max_new_tokens": 4, "code": "x"}}}, "task.code: Extra"),
        ({"prompt": PROMPT | {"name": "os.system"}}, "plugins must name the package of the task 'os.system'"),
        ({"prompt": None}, "schema 2: task: "),
        ({"prompt": PROMPT | {"max_new_tokens": 4}}, "prompt.max_new_tokens belongs to a later schema"),
        (
            {"prompt": {k: v for k, v in PROMPT.items() if k != "answer_normalization"}},
            "must have the field answer_normalization",
        ),
        ({"prompt": {k: v for k, v in PROMPT.items() if k != "generation"}}, "must have the field max_new_tokens"),
    ],
)
def test_what_schema_2_does_not_have_is_refused(changes, message):
    with pytest.raises(ManifestError, match=message):
        read(**changes)


@pytest.mark.parametrize("data", [{"kind": "tumor"}, {"question_type": "tumor"}])
def test_a_recipe_with_earlier_names_is_read_under_the_present_ones(data):
    training = TRAINING | {"recipe": {"name": "brain", "data": {"source": "jsonl", **data}}}
    expected = {"name": "brain", "data": {"source": "jsonl", "question_type": "tumor"}}
    manifest = read(training=training)
    assert manifest.training.recipe == expected
    third = json.loads(manifest.to_bytes()) | {
        "training": manifest.training.model_dump() | {"recipe": training["recipe"]}
    }
    assert AdapterManifest.parse(canonical_json(third)).training.recipe == expected


def test_scores_with_earlier_names_are_read_under_the_present_ones():
    metrics = {"test": scores_json(0.75, question_types={"color": 0.5})}
    third = json.loads(read().to_bytes()) | {"metrics": json.loads(json.dumps(metrics))}
    third["metrics"]["test"]["by_kind"] = third["metrics"]["test"].pop("by_question_type")
    manifest = AdapterManifest.parse(canonical_json(third))
    assert manifest.metrics == metrics
    assert named_values(manifest.metrics)["test.color.exact_match"] == 0.5


def test_a_recipe_with_both_names_of_a_key_is_refused():
    recipe = {"data": {"kind": "a", "question_type": "b"}}
    with pytest.raises(ManifestError, match="manifest.json: training.recipe.data.question_type must be given once"):
        read(training=TRAINING | {"recipe": recipe})
