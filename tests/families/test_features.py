"""Stored features in the place of images: the same ids, the same logits, the same answers, and nothing below runs."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from accelerate import Accelerator

from finetune.assemble.loading import load_base
from finetune.core.example import Example, answer, as_images, ask
from finetune.errors import ModelError
from finetune.methods.adapter import attach
from finetune.runs.frozen_features import collator_of_run
from finetune.training.replay import replays
from tests.matrix import recipe_of

MIXED = {"one": [0], "two in a row": [1], "mixed": [0, 1, 2, 3, 4], "none": [3]}
LORA = {"name": "lora", "r": 4}
BEGINS = {
    "language": LORA,
    "projector": [{"name": "full_modules", "parameters": ["projector"]}, LORA],
    "vision": {**LORA, "towers": {"language": "none", "vision": {"layers": "1-1"}}},
    "last layer": {**LORA, "towers": {"language": {"layers": "last 1"}}},
}
NO_LAYERS = {"fast_vlm": {"vision"}}  # a tower of convolutions has no linear module
# A product or a convolution may take another way for a batch than for one image, and rounds otherwise then: always
# in FastVLM's tower, on some CPUs in the others. A run holds stored features to no more
# (finetune/runs/feature_checks.py); those of another image are off by as much as the logits are large.
ROUNDING = 1e-4  # of the largest logit


@pytest.fixture(scope="module")
def mixed_rows():
    """Rows with one, two or no image, of sizes that differ."""
    rng = np.random.default_rng(0)

    def image(width, height):
        return rng.integers(0, 255, (height, width, 3), dtype=np.uint8)

    return [
        Example(
            id=str(i),
            messages=[*ask("what is it" + " then" * i, num_images=count), answer("yes no"[: 3 + i])],
            media=as_images([image(40 + 13 * i + 20 * j, 64 - 7 * i) for j in range(count)]),
            answers=["yes"],
        )
        for i, count in enumerate([1, 2, 1, 0, 1])
    ]


@pytest.fixture(scope="module", params=BEGINS)
def stored(request, tiny_family, mixed_rows, tmp_path_factory):
    """A base with the collator of a run whose adapter begins somewhere, and what the run logs."""
    if request.param in NO_LAYERS.get(tiny_family.name, ()):
        pytest.skip("the tower has no layers to adapt")
    folder = tmp_path_factory.mktemp("features")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("FINETUNE_CACHE", str(folder))
        base, plain = (load_base(str(tiny_family), device="cpu") for _ in range(2))
        recipe = recipe_of(BEGINS[request.param], tiny_family, folder)
        logs = []
        collator = collator_of_run(recipe, base, mixed_rows, [], [], Accelerator(cpu=True), logs.append)
    return SimpleNamespace(
        begins=request.param, base=base, plain=plain, collator=collator, logs=logs, recipe=recipe, rows=mixed_rows
    )


def nothing_below_runs(stored, monkeypatch, *, training):
    """Make opening an image raise, and running a module inside of one whose output is stored."""

    def refuse(*args, **kwargs):
        raise AssertionError("an image was opened, or a frozen module ran")

    monkeypatch.setattr("finetune.data.media.open_image", refuse)
    language = tuple(f"{path}." for path in stored.base.towers["language"])
    for name, module in stored.base.model.named_modules():
        if replays(module) and (training or not name.startswith(language)):
            for inner in list(module.modules())[1:]:
                monkeypatch.setattr(inner, "forward", refuse)


@pytest.mark.parametrize("which", MIXED)
def test_logits_and_answers_are_those_with_images(stored, monkeypatch, which):
    rows = [stored.rows[i] for i in MIXED[which]]
    base, plain = stored.base, stored.plain
    wanted, asked = plain.collator.training_batch(rows), plain.collator.prompt_batch(rows)
    with torch.inference_mode():
        logits = plain.family.outputs(plain.model, wanted.inputs)
    answers = plain.task(plain.default_task).predict(plain.model, asked)
    with monkeypatch.context() as patch:
        nothing_below_runs(stored, patch, training=True)
        batch = stored.collator.training_batch(rows)
        with torch.inference_mode():
            found = base.family.outputs(base.model, batch.inputs)
    with monkeypatch.context() as patch:
        nothing_below_runs(stored, patch, training=False)
        prompts = stored.collator.prompt_batch(rows)
        assert base.task(base.default_task).predict(base.model, prompts) == answers
    for with_images, with_features in ((wanted, batch), (asked, prompts)):
        assert set(with_features.inputs) - {"stored_outputs"} == set(with_images.inputs)
        for name, value in with_images.inputs.items():
            assert name.startswith("pixel_") or torch.equal(value, with_features.inputs[name]), name
    assert torch.equal(wanted.labels, batch.labels)
    mask = wanted.inputs["attention_mask"].bool()
    assert (logits - found)[mask].abs().max() <= ROUNDING * logits[mask].abs().max()


def test_the_boundary_is_where_the_adapter_begins(stored):
    begins = stored.begins
    assert all(line.startswith("feature store: up to model.") for line in stored.logs), stored.logs
    assert len(stored.logs) == (2 if begins == "last layer" else 1)
    if begins == "last layer":
        assert "layers.0: 5 rows, 5 of them new" in stored.logs[1]
    if begins == "vision":
        assert ".0" in stored.logs[0].partition(": the images of")[0]


def test_gradients_are_those_with_images(stored):
    """Every parameter of the adapter gets the gradient that it gets from images."""
    gradients = []
    for base, collator in ((stored.plain, stored.plain.collator), (stored.base, stored.collator)):
        torch.manual_seed(0)
        attachment = attach(base.host, stored.recipe.parts)
        batch = collator.training_batch([stored.rows[i] for i in MIXED["mixed"]])
        mask = batch.inputs["attention_mask"].bool()
        base.family.outputs(base.model, batch.inputs)[mask].float().square().sum().backward()
        gradients.append({name: parameter.grad for name, parameter in attachment.parameters.items()})
    wanted, found = gradients
    assert wanted.keys() == found.keys()
    for name, gradient in wanted.items():
        assert (gradient is None) == (found[name] is None), name
        if gradient is not None:
            assert torch.allclose(gradient, found[name], rtol=1e-3, atol=1e-4 * float(gradient.abs().max())), name
    assert any(bool(gradient.any()) for gradient in found.values() if gradient is not None)


def test_a_processor_without_replacements_is_refused(tiny_family, mixed_rows, monkeypatch):
    base = load_base(str(tiny_family), device="cpu")
    family = type(base.family)
    encode = family._encode
    monkeypatch.setattr(family, "_encode", lambda self, processor, *args: encode(self, base.processor, *args))
    with pytest.raises(ModelError, match="must return the text that replaces an image, and does not"):
        base.family.image_step(base.processor, base.collator.open(mixed_rows[0]))
