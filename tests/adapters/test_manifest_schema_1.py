"""Manifests of schema 1 are read for ever: what they say keeps its meaning under today's names."""

import json

import pytest

from finetune.adapters.manifest import AdapterManifest, canonical_json
from finetune.errors import ManifestError
from finetune.metrics.names import named_values

ZERO, ONE = "0" * 64, "1" * 64
OLD = {
    "schema_version": 1,
    "namespace": "medical",
    "name": "brain-mri",
    "created": "2026-11-23T10:00:00+00:00",
    "synthetic": True,
    "base": {"model_type": "toy", "files": {"model.safetensors": ZERO}, "config": ZERO},
    "processor": dict.fromkeys(("tokenizer", "processor_config", "chat_template", "generation_config"), ZERO),
    "adapter": {
        "peft_type": "LORA",
        "parts": [{"method": "lora", "options": {"r": 2}, "modules": {"language": ["model.layer"]}}],
        "tensors": {"model.layer.lora_A": {"shape": [2, 4], "dtype": "F32"}},
    },
    "prompt": {
        "name": "vqa",
        "system_prompt": "Be brief.",
        "question_template": "Q: {question}",
        "caption_question": None,
        "generation": {"max_new_tokens": 16, "do_sample": False, "num_beams": 1},
        "answer_normalization": "vqa",
    },
    "toolchain": {"torch": "2"},
    "training": {
        "recipe": ONE,
        "data": {"train": ZERO},
        "rows": {"train": 8},
        "streamed": [],
        "seed": 0,
        "steps": 3,
        "task": "vqa",
        "domain": "medical",
    },
    "metrics": {"after": {"exact_match": 0.75}},
    "probe": {"version": 1, "seed": 0, "dtype": "float32", "base": [[0.0]] * 4, "adapter": [[1.0]] * 4},
    "files": {name: {"sha256": ZERO, "size": 1} for name in ("adapter_model.safetensors", "adapter_config.json")},
}


def read(**changes):
    fields = json.loads(json.dumps(OLD))
    for path, value in changes.items():
        section, _, name = path.partition("__")
        (fields[section] if name else fields)[name or section] = value
    return AdapterManifest.parse(canonical_json(fields))


def test_the_fields_keep_their_meaning():
    manifest = read()
    assert manifest.schema_version == 3
    assert (manifest.training.recipe_digest, manifest.training.recipe) == (ONE, None)
    assert named_values(manifest.metrics) == {"test.exact_match": 0.75}
    section = manifest.task
    assert (section.answer_normalization, section.image_position, section.max_new_tokens) == ("vqa", "first", 16)
    assert section.normalize("The two.") == "2"
    assert (section.system_prompt, section.question_template) == ("Be brief.", "Q: {question}")


def test_a_dual_encoder_is_read_too():
    prompt = {"name": "contrastive", "text_template": "a {label}", "answer_normalization": "vqa"}
    assert read(prompt=prompt).task.normalize("The two.") == "2"


def test_its_bytes_are_not_needed_again_and_what_is_read_is_todays():
    manifest = read()
    assert AdapterManifest.parse(manifest.to_bytes()) == manifest


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"training__recipe_digest": ZERO}, "schema 1: training.recipe_digest belongs to a later schema"),
        ({"prompt__image_position": "first"}, "schema 1: prompt.image_position belongs to a later schema"),
        ({"prompt__answer_normalization": "exact"}, "schema 1: prompt.answer_normalization must be 'vqa'"),
        ({"training__recipe": {"name": "x"}}, "schema 1: training.recipe_digest: Input should be a valid string"),
        ({"training": []}, "schema 1: training: "),
        ({"prompt": None}, "schema 1: task: "),
        ({"schema_version": True}, "schema 3: schema_version: Input should be 3"),
        ({"schema_version": 1.0}, "schema 3: schema_version: Input should be 3"),
        ({"schema_version": 0}, "schema 3: schema_version: Input should be 3"),
        ({"color": 1}, "schema 1: color: Extra inputs"),
    ],
)
def test_what_schema_1_does_not_have_is_refused(changes, message):
    with pytest.raises(ManifestError, match=message):
        read(**changes)
