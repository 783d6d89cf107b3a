"""The loop: exact accumulation, a base that stays as it is, and runs that stop when they would be worthless."""

import json

import pytest
import torch
from accelerate import Accelerator

from finetune.build import examples_of, load_base
from finetune.errors import TrainingError
from finetune.methods.adapter import attach
from finetune.training.log import RunLog
from finetune.training.loop import Trainer, set_train_mode


@pytest.fixture
def build(make_recipe, tmp_path):
    """Returns a function: base folder, train options -> (base, attachment, trainer, examples, log)."""

    def build(folder, **options):
        recipe = make_recipe(folder, train=options)
        base = load_base(str(folder), device="cpu")
        torch.manual_seed(0)
        attachment = attach(base.host, recipe.method)
        trainer = Trainer(
            base.model,
            attachment,
            base.task(recipe.task),
            base.collator.training_batch,
            recipe.train,
            Accelerator(cpu=True),
            seed=0,
        )
        return base, attachment, trainer, examples_of(recipe, "train"), RunLog(tmp_path, every=1)

    return build


def everything(model):
    return {n: t.clone() for n, t in (*model.named_parameters(), *model.named_buffers()) if "lora_" not in n}


@pytest.mark.parametrize(("batch_size", "accumulation"), [(1, 8), (2, 4), (4, 2)])
def test_eight_rows_at_once_or_one_by_one_give_the_same_adapter(build, tiny_base, batch_size, accumulation):
    """18 rows of uneven answers in windows of 8: the last window of an epoch holds 2."""
    results = []
    for size, number in ((8, 1), (batch_size, accumulation)):
        _, attachment, trainer, examples, log = build(
            tiny_base, max_steps=4, batch_size=size, gradient_accumulation_steps=number, learning_rate=1e-3
        )
        trainer.train(examples, log)
        results.append({name: p.detach().clone() for name, p in attachment.parameters.items()})
    whole, split = results
    worst = max((whole[name] - split[name]).abs().max().item() for name in whole)
    assert worst < 1e-5, "fp32 sums in another order; a mean of means is off by more than 3e-3 here"


def test_the_base_stays_as_it_is_and_the_loss_falls(build, tiny_base, tmp_path):
    base, attachment, trainer, examples, log = build(tiny_base, max_steps=30, batch_size=6, learning_rate=0.03)
    before = everything(base.model)
    trainer.train(examples, log)
    after = everything(base.model)
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before), "buffers count too"
    lines = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert len(lines) == 30 and lines[-1]["loss"] < 0.8 * lines[0]["loss"]
    assert {"samples_per_s", "tokens_per_s", "learning_rate", "grad_norm", "epoch"} <= lines[0].keys()


def test_only_what_trains_is_in_training_mode(build, tiny_fast_vlm):
    base, attachment, *_ = build(tiny_fast_vlm)
    set_train_mode(base.model, attachment)
    training = {type(m).__name__ for m in base.model.modules() if m.training}
    assert "BatchNorm2d" not in training and "Linear" in training
    assert not base.model.model.vision_tower.training


def test_a_dead_parameter_stops_the_run_by_name(build, tiny_fast_vlm):
    _, attachment, trainer, examples, log = build(tiny_fast_vlm)
    dead = next(name for name in attachment.parameters if "lora_B" in name)
    attachment.parameters[dead].register_hook(torch.zeros_like)
    with pytest.raises(TrainingError, match=f"1 adapter tensors get no .*: {dead}"):
        trainer.train(examples, log)


def test_a_gradient_that_is_not_finite_stops_the_run_with_its_rows(build, tiny_fast_vlm):
    _, attachment, trainer, examples, log = build(tiny_fast_vlm, max_steps=5)
    trainer._refuse_dead = lambda backward: None
    parameter = next(iter(attachment.parameters.values()))
    parameter.register_hook(lambda gradient: gradient * float("nan"))
    with pytest.raises(TrainingError, match=r"step 1: the gradient is not finite .* Rows: train.jsonl:\d+"):
        trainer.train(examples, log)


def test_early_stopping_keeps_the_best(build, tiny_fast_vlm):
    _, _, trainer, examples, log = build(tiny_fast_vlm, max_steps=20, eval_steps=2, early_stopping_patience=2)
    scores, kept = iter([0.1, 0.5, 0.4, 0.5, 0.9]), []
    state = trainer.train(
        examples, log, validate=lambda: next(scores), on_better=lambda: kept.append(trainer.state.step)
    )
    assert kept == [2, 4] and state.step == 8
    assert (state.best_score, state.best_step) == (0.5, 4)


def test_workers_give_the_same_rows(build, tiny_fast_vlm):
    results = []
    for workers in (0, 2):
        _, attachment, trainer, examples, log = build(tiny_fast_vlm, max_steps=3, num_workers=workers)
        trainer.train(examples, log)
        results.append([p.detach().clone() for p in attachment.parameters.values()])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))
