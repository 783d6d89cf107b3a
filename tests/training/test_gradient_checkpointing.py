"""Gradient checkpointing: the same gradients from less memory, on every family and with every method."""

import pytest
import torch
from torch import nn
from transformers.modeling_layers import GradientCheckpointingLayer

from finetune.assemble.loading import load_base
from finetune.errors import TrainingError
from finetune.methods.adapter import attach
from finetune.training.gradient_checkpointing import recomputing
from finetune.training.trainable import set_train_mode
from tests.matrix import LORA, PROMPT, extended, recipe_of, rows
from tests.tiny import FAMILIES

EVERYWHERE = {"language": "all-linear", "projector": "none", "vision": "all-linear"}
METHODS = {
    "lora in both towers, dropout": {**LORA, "lora_dropout": 0.3, "towers": EVERYWHERE},
    "prompt": PROMPT,
    "prompt and full modules": [PROMPT, {"name": "full_modules", "parameters": ["projector", "norms"]}],
}
# A dual encoder takes no prompt; the tiny FastVLM's tower has no linear module.
CELLS = [(family, method) for family in FAMILIES for method in METHODS if family != "clip" or "prompt" not in method]


def gradients(base, attachment, batch, *, enabled):
    """Name -> gradient, and how many values the graph kept for the backward pass."""
    torch.manual_seed(7)
    set_train_mode(base.model, attachment)
    kept = 0

    def count(tensor):
        nonlocal kept
        kept += tensor.numel()
        return tensor

    with recomputing(base.model, enabled=enabled):
        with torch.autograd.graph.saved_tensors_hooks(count, lambda tensor: tensor):
            (term,) = base.objective(base.task(base.default_task)).terms(base.model, batch).values()
        kept_by_forward = kept
        term.loss_sum.backward()
    found = {name: p.grad.clone() for name, p in attachment.parameters.items()}
    for parameter in attachment.parameters.values():
        parameter.grad = None
    return found, kept_by_forward


@pytest.mark.parametrize(("family", "method"), CELLS)
def test_gradients_are_the_same(family, method, tmp_path):
    section = METHODS[method]
    if family == "fast_vlm" and isinstance(section, dict) and "towers" in section:
        section = {**section, "towers": {**EVERYWHERE, "vision": "none"}}
    folder = FAMILIES[family](tmp_path / "base")
    base = load_base(str(folder), device="cpu")
    attachment = attach(base.host, recipe_of(section, folder, tmp_path).method)
    for parameter in attachment.parameters.values():  # LoRA's B is zero, which would hide A's gradient
        nn.init.normal_(parameter, std=0.1)
    batch = extended(attachment, base.collator.training_batch([(row, True) for row in rows()]))
    plain, all_kept = gradients(base, attachment, batch, enabled=False)
    recomputed, kept = gradients(base, attachment, batch, enabled=True)
    assert kept < 0.8 * all_kept, "nothing was recomputed"
    assert all(gradient.abs().max() > 0 for gradient in plain.values())
    for name, gradient in plain.items():
        assert torch.equal(recomputed[name], gradient), name


def test_generation_and_what_comes_after_are_as_ever(tiny_fast_vlm):
    base = load_base(str(tiny_fast_vlm), device="cpu")
    before = {name: vars(module).get("forward") for name, module in base.model.named_modules()}
    batch, task = base.collator.prompt_batch(rows()), base.task(base.default_task)
    predicted = task.predict(base.model, batch)
    with recomputing(base.model):
        assert task.predict(base.model, batch) == predicted
    assert {name: vars(module).get("forward") for name, module in base.model.named_modules()} == before


def test_a_model_without_layers_is_refused():
    with pytest.raises(TrainingError, match="a layer that transformers can recompute, and Linear has none. Set"):
        with recomputing(nn.Linear(2, 2)):
            pass


def test_the_recipe_switches_it_on(build, tiny_fast_vlm, monkeypatch):
    """Through the loop, with dropout; and it is off again afterwards."""
    from finetune.training import gradient_checkpointing

    calls, results = [], []
    checkpoint = gradient_checkpointing.checkpoint
    monkeypatch.setattr(
        gradient_checkpointing, "checkpoint", lambda *args, **kwargs: calls.append(1) or checkpoint(*args, **kwargs)
    )
    for enabled in (False, True):
        run = build(tiny_fast_vlm, dropout=0.2, max_steps=2, gradient_checkpointing=enabled)
        run.trainer.train(run.examples)
        results.append(run.weights())
    assert len(calls) == 2 * 2, "two layers, two steps of one micro-batch"
    assert all(torch.equal(results[0][name], results[1][name]) for name in results[0])
    layers = [m for m in run.base.model.modules() if isinstance(m, GradientCheckpointingLayer)]
    assert len(layers) == 2 and not any("forward" in vars(layer) for layer in layers)
