"""Contrastive learning: its loss by hand, its cached gradient against the direct one, in one process and in two."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator
from transformers.models.clip.modeling_clip import image_text_contrastive_loss

from finetune.assemble.loading import load_base
from finetune.assemble.rows import examples_of
from finetune.errors import TrainingError
from finetune.methods.adapter import attach
from finetune.objectives.contrastive import pair_losses
from finetune.training.log import RunLog
from finetune.training.loop import Trainer, set_train_mode

ROOT = Path(__file__).parents[2]
EVERYWHERE = {"language": "all-linear", "projector": "none", "vision": "all-linear"}
LORA = {"name": "lora", "r": 4, "lora_alpha": 8, "towers": EVERYWHERE}
FULL_MODULES = {"name": "full_modules", "parameters": ["projector", "norms"]}


def embeddings(*pairs):
    """[N, 2, D] of (image, text) vectors."""
    return torch.tensor(pairs, dtype=torch.float32)


def test_the_loss_by_hand():
    east, north = [1.0, 0.0], [0.0, 1.0]
    found = pair_losses(embeddings((east, east), (north, east)), torch.tensor([0, 0]), torch.tensor(2.0))
    # Similarities [[2, 2], [0, 0]]: each image finds the texts equally close, each text finds the first image.
    e2 = torch.tensor(2.0).exp()
    half = torch.tensor(0.5)
    first = (-half.log() - (e2 / (e2 + 1)).log()) / 2
    second = (-half.log() - (1 / (e2 + 1)).log()) / 2
    assert torch.allclose(found, torch.stack([first, second]))


def test_different_texts_give_the_loss_of_transformers():
    both = torch.nn.functional.normalize(torch.randn(5, 2, 8), dim=-1)
    scale = torch.tensor(14.0)
    mean = pair_losses(both, torch.zeros(5), scale).mean()
    assert torch.allclose(mean, image_text_contrastive_loss(scale * both[:, 1] @ both[:, 0].T))


def test_a_row_that_fills_up_takes_no_part():
    both = torch.nn.functional.normalize(torch.randn(4, 2, 8), dim=-1)
    found = pair_losses(both, torch.tensor([0, -100, 0, 0]), torch.tensor(14.0))
    alone = pair_losses(both[[0, 2, 3]], torch.zeros(3), torch.tensor(14.0))
    # 4 rows and 3 are products and sums of other sizes, which may add in another order; a row that took part would
    # change each loss by far more.
    assert torch.allclose(found[[0, 2, 3]], alone, rtol=1e-5, atol=1e-6) and found[1] == 0
    assert not torch.allclose(pair_losses(both, torch.zeros(4), torch.tensor(14.0))[[0, 2, 3]], alone, rtol=1e-3)


@pytest.fixture
def adapted(tiny_clip, make_recipe):
    """Return a function: lora_dropout -> (base, attachment, objective, rows); all that can train is attached."""

    def build(dropout):
        task = {"name": "contrastive", "text_template": "a photo of {label}"}
        recipe = make_recipe(tiny_clip, method=[{**LORA, "lora_dropout": dropout}, FULL_MODULES], task=task)
        base = load_base(str(tiny_clip), device="cpu")
        attachment = attach(base.host, recipe.method)
        with torch.no_grad():
            for parameter in attachment.parameters.values():
                parameter.add_(0.05 * torch.randn_like(parameter))
        set_train_mode(base.model, attachment)
        return base, attachment, base.objective(base.task(recipe.task)), examples_of(recipe, "train")[:8]

    return build


def gradients(attachment):
    found = {name: parameter.grad.clone() for name, parameter in attachment.parameters.items()}
    for parameter in attachment.parameters.values():
        parameter.grad = None
    return found


def worst(found, wanted):
    """The largest difference of a tensor's gradients, relative to the norm of all."""
    size = torch.cat([g.flatten() for g in wanted.values()]).norm()
    return max((found[name] - wanted[name]).norm() / size for name in wanted)


@pytest.mark.parametrize("dropout", [0.0, 0.4])
def test_the_cached_gradient_is_the_direct_one(adapted, dropout):
    base, attachment, objective, rows = adapted(dropout)
    assert not base.model.logit_scale.requires_grad
    batches = [base.collator.training_batch(rows[i:j]) for i, j in ((0, 3), (3, 6), (6, 8))]
    torch.manual_seed(1)
    # Directly: all micro-batches with a graph, one loss over all rows.
    parts = [base.model(**batch.inputs) for batch in batches]
    both = torch.stack([torch.cat([p.image_embeds for p in parts]), torch.cat([p.text_embeds for p in parts])], dim=1)
    labels = torch.cat([batch.labels for batch in batches])
    direct = pair_losses(both, labels, base.model.logit_scale.exp())
    direct.mean().backward()
    wanted, after = gradients(attachment), torch.get_rng_state()
    torch.manual_seed(1)
    sums = objective.accumulate_gradients(base.model, batches, lambda loss: loss().backward())
    assert worst(gradients(attachment), wanted) < 1e-6
    assert torch.equal(torch.get_rng_state(), after), "the second pass draws nothing of its own"
    assert torch.allclose(torch.stack([part["pairs"] for part in sums]).sum(), direct.sum())
    assert base.model.logit_scale.grad is None
    if dropout:
        torch.manual_seed(2)
        objective.accumulate_gradients(base.model, batches, lambda loss: loss().backward())
        assert worst(gradients(attachment), wanted) > 1e-2, "dropout is at work"


@pytest.fixture
def fit(tiny_clip, make_recipe, tmp_path):
    """Return a function that trains LoRA in steps of 8 of 18 rows: (losses, weights).

    The last step of an epoch holds 2.
    """

    def fit(batch_size, accumulation, *, before=lambda inputs: None):
        recipe = make_recipe(
            tiny_clip,
            task={"name": "contrastive"},
            method=[LORA],
            train={
                "max_steps": 4,
                "batch_size": batch_size,
                "gradient_accumulation_steps": accumulation,
                "learning_rate": 1e-3,
            },
        )
        base = load_base(str(tiny_clip), device="cpu")
        torch.manual_seed(0)
        attachment = attach(base.host, recipe.method)
        base.model.register_forward_pre_hook(lambda model, args, kwargs: before(kwargs), with_kwargs=True)
        objective, collate = base.objective(base.task(recipe.task)), base.collator.training_batch
        log = RunLog(tmp_path, every=1)
        trainer = Trainer(base.model, attachment, objective, collate, recipe.train, Accelerator(cpu=True), log, seed=0)
        trainer.train(examples_of(recipe, "train"))
        losses = [json.loads(line)["loss"] for line in log.file.read_text().splitlines()]
        return losses, {name: p.detach().clone() for name, p in attachment.parameters.items()}

    return fit


@pytest.mark.parametrize(("batch_size", "accumulation"), [(4, 2), (1, 8)])
def test_the_loss_is_of_the_step_however_it_is_split(fit, batch_size, accumulation):
    (losses, whole), (split_losses, split) = fit(8, 1), fit(batch_size, accumulation)
    assert split_losses == pytest.approx(losses, abs=1e-5)
    assert max((whole[name] - split[name]).abs().max().item() for name in whole) < 1e-5, "sums in another order"


def test_out_of_memory_halves_the_micro_batch_and_not_what_is_contrasted(fit, capsys):
    def small(inputs):
        if len(inputs["pixel_values"]) > 2:
            raise torch.OutOfMemoryError("too many images")

    (losses, whole), (small_losses, split) = fit(8, 1), fit(8, 1, before=small)
    assert "with micro-batches of 2, 4 to a step" in capsys.readouterr().out
    assert small_losses == pytest.approx(losses, abs=1e-5)
    assert max((whole[name] - split[name]).abs().max().item() for name in whole) < 1e-5


def test_a_loss_that_is_not_finite_names_its_row_and_not_the_whole_step(fit):
    marked = []

    def spoil(inputs):
        first = inputs["pixel_values"][0].clone()
        marked.append(first) if not marked else None
        for image in inputs["pixel_values"]:
            if torch.equal(image, marked[0]):
                image.fill_(float("nan"))

    with pytest.raises(TrainingError, match=r"Rows whose own loss is not finite: train.jsonl:\d+\. "):
        fit(4, 2, before=spoil)


@pytest.mark.distributed
def test_two_processes_train_the_same_adapter_as_one(tiny_clip, rows_folder, tmp_path):
    """A step has 8 rows either way, 2 in the last of an epoch: one process then has a row that takes no part."""
    from safetensors.torch import load_file

    config = tmp_path / "pairs.yaml"
    config.write_text(
        f"name: pairs\ndomain: testing\nmodel: {{name_or_path: {tiny_clip}, device: cpu}}\n"
        "method: {name: lora, r: 4, towers: {language: all-linear, vision: all-linear}}\n"
        f"data: {{source: jsonl, root: {rows_folder}}}\ntask: {{name: contrastive}}\n"
        "train: {epochs: 2, learning_rate: 1e-3, eval_steps: 100}\n"
    )
    weights = []
    for name, launcher, size in (("one", [], 8), ("two", ["-m", "torch.distributed.run", "--nproc_per_node", "2"], 2)):
        few = [f"train.batch_size={size}", f"train.gradient_accumulation_steps={2 if size == 2 else 1}"]
        out = subprocess.run(
            [sys.executable, *launcher, str(ROOT / "recipes" / "train.py"), str(config), *few,
             f"train.output_dir={tmp_path / name}"],
            capture_output=True, text=True, cwd=ROOT,
            env={**os.environ, "PYTHONPATH": str(ROOT), "ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1",
                 "FINETUNE_NUM_PROCESSES": {"one": "1", "two": "2"}[name]},
        )  # fmt: skip
        assert out.returncode == 0, out.stderr[-3000:]
        weights.append(load_file(tmp_path / name / "pairs" / "last" / "adapter_model.safetensors"))
    assert max((weights[0][key] - weights[1][key]).abs().max().item() for key in weights[0]) < 1e-5
