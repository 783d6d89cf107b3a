"""The loop: exact accumulation, a base that stays as it is, and runs that stop when they would be worthless."""

from dataclasses import replace

import pytest
import torch

from finetune.core.example import ask
from finetune.errors import TrainingError
from finetune.training.trainable import set_train_mode
from finetune.training.validation import Validation
from tests.tiny import save_idefics3


def everything(model):
    return {n: t.clone() for n, t in (*model.named_parameters(), *model.named_buffers()) if "lora_" not in n}


@pytest.mark.parametrize(("batch_size", "accumulation"), [(1, 8), (2, 4), (4, 2)])
def test_eight_rows_at_once_or_one_by_one_give_the_same_adapter(build, tiny_base, batch_size, accumulation):
    """18 rows of uneven answers in steps of 8: the last step of an epoch holds 2."""
    results = []
    for size, number in ((8, 1), (batch_size, accumulation)):
        run = build(tiny_base, max_steps=4, batch_size=size, gradient_accumulation_steps=number, learning_rate=1e-3)
        run.trainer.train(run.examples)
        results.append(run.weights())
    whole, split = results
    worst = max((whole[name] - split[name]).abs().max().item() for name in whole)
    assert worst < 1e-5, "fp32 sums in another order; a mean of means is off by more than 3e-3 here"


def test_the_base_stays_as_it_is_and_the_loss_falls(build, tiny_base):
    run = build(tiny_base, max_steps=30, batch_size=6, learning_rate=0.03)
    before = everything(run.base.model)
    run.trainer.train(run.examples)
    after = everything(run.base.model)
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before), "buffers count too"
    lines = run.lines()
    assert len(lines) == 30 and lines[-1]["loss"] < 0.8 * lines[0]["loss"]
    assert {"samples_per_s", "tokens_per_s", "learning_rate", "grad_norm", "epoch"} <= lines[0].keys()


def test_only_what_trains_is_in_training_mode(build, tiny_fast_vlm):
    run = build(tiny_fast_vlm)
    set_train_mode(run.base.model, run.attachment)
    training = {type(m).__name__ for m in run.base.model.modules() if m.training}
    assert "BatchNorm2d" not in training and "Linear" in training
    assert not run.base.model.model.vision_tower.training


def test_a_dead_parameter_stops_the_run_by_name(build, tiny_fast_vlm):
    run = build(tiny_fast_vlm)
    dead = next(name for name in run.attachment.parameters if "lora_B" in name)
    run.attachment.parameters[dead].register_hook(torch.zeros_like)
    with pytest.raises(TrainingError, match=f"a gradient that is not zero, but 1 of them .*: {dead}"):
        run.trainer.train(run.examples)


def test_a_gradient_that_is_not_finite_stops_the_run_with_its_rows(build, tiny_fast_vlm):
    run = build(tiny_fast_vlm, max_steps=5)
    parameter = next(iter(run.attachment.parameters.values()))
    parameter.register_hook(lambda gradient: gradient * float("nan"))
    with pytest.raises(TrainingError, match=r"step 1: the gradient is not finite .* Rows: train.jsonl:\d+"):
        run.trainer.train(run.examples)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_loss_that_is_not_finite_names_its_row_and_keeps_the_state_before(
    build, tiny_fast_vlm, before_each_forward, value
):
    """Row 11 of 18 is bad, and comes with others in its micro-batch."""

    def spoil(terms):
        return {n: replace(t, loss_sum=t.loss_sum * value) for n, t in terms.items()}

    def before(batch):
        return spoil if any(example.id == "train.jsonl:11" for example in batch.examples) else None

    run = build(
        tiny_fast_vlm, wrap=before_each_forward(before), epochs=1.0, gradient_accumulation_steps=2, batch_size=2
    )
    with pytest.raises(TrainingError) as caught:
        run.trainer.train(run.examples)
    step = run.trainer.state.step
    assert f"step {step + 1}: the loss is not finite" in str(caught.value)
    assert "Rows whose own loss is not finite: train.jsonl:11. Lower train.learning_rate" in str(caught.value)
    kept = run.checkpoints.read(run.checkpoints.path(step))
    assert str(kept.path) in str(caught.value)
    assert all(torch.equal(kept.tensors[f"adapter/{name}"], tensor) for name, tensor in run.weights().items())
    assert all(bool(torch.isfinite(tensor).all()) for tensor in run.weights().values())
    assert len(run.lines()) == step


def test_early_stopping_keeps_the_best(build, tiny_fast_vlm):
    run = build(tiny_fast_vlm, max_steps=20, eval_steps=2, early_stopping_patience=2)
    scores, kept = iter([0.1, 0.5, 0.4, 0.5, 0.9]), []
    state = run.trainer.train(
        run.examples,
        validate=lambda: Validation(values={"exact_match": next(scores)}, loss=1.0),
        on_better=lambda: kept.append(run.trainer.state.step),
    )
    assert kept == [2, 4, 8] and state.step == 8, "one that is as good is taken, but not waited for"
    assert (state.best_score, state.best_loss, state.best_step) == (0.5, 1.0, 8)


@pytest.mark.filterwarnings("ignore:This DataLoader will create 3 worker")  # where there are fewer cores
def test_workers_give_the_same_rows(build, tiny_fast_vlm):
    results = []
    for workers in (0, 1, 3):
        run = build(tiny_fast_vlm, dropout=0.2, max_steps=7, num_workers=workers)  # into a second epoch
        run.trainer.train(run.examples)
        results.append(run.weights())
    for other in results[1:]:
        assert all(torch.equal(results[0][name], other[name]) for name in other)


def test_a_row_is_asked_for_as_its_epoch_has_it(build, tiny_fast_vlm, monkeypatch):
    asked = []
    run = build(tiny_fast_vlm, epochs=2.0, batch_size=6)
    monkeypatch.setattr(
        type(run.examples[0]), "in_epoch", lambda self, epoch, *, seed: asked.append((self.id, epoch, seed)) or self
    )
    run.trainer.train(run.examples)
    assert sorted(asked) == sorted((example.id, epoch, 0) for example in run.examples for epoch in (0, 1))


VISION = {"language": "none", "projector": "none", "vision": "all-linear"}


def without_images(examples):
    return [replace(e, media=(), messages=[*ask(e.meta["question"], num_images=0), e.messages[-1]]) for e in examples]


def test_rows_without_an_image_do_not_count_for_the_vision_tower(build, tmp_path):
    run = build(save_idefics3(tmp_path / "base"), max_steps=6, batch_size=1, towers=VISION)
    rows = [*without_images(run.examples[:3]), *run.examples[3:6]]
    before = run.weights()
    run.trainer.train(rows)
    assert all(not torch.equal(before[name], weight) for name, weight in run.weights().items())


def test_rows_that_never_reach_what_trains_stop_the_run(build, tmp_path):
    run = build(save_idefics3(tmp_path / "base"), max_steps=3, batch_size=2, towers=VISION)
    with pytest.raises(TrainingError, match="must get a gradient, but no row of 3 steps reached"):
        run.trainer.train(without_images(run.examples))


@pytest.mark.parametrize("grouped", [True, False])
def test_rows_of_like_length_share_a_step(build, tiny_fast_vlm, before_each_forward, capsys, grouped):
    """A third of the 18 answers is longer than the others; steps of 2 that mix both are left only by the odd one."""
    mixed = []

    def before(batch):
        mixed.append(len({example.num_tokens for example in batch.examples}) > 1)

    run = build(tiny_fast_vlm, wrap=before_each_forward(before), epochs=2.0, batch_size=2, group_by_length=grouped)
    run.trainer.train(run.examples)
    assert len({example.num_tokens for example in run.examples}) > 1
    assert sum(mixed) <= 4 if grouped else sum(mixed) > 4
    assert f"of all tokens; with train.group_by_length: {str(not grouped).lower()} it" in capsys.readouterr().out


def test_rows_that_are_held_against_each_other_are_not_grouped(build, tiny_fast_vlm, before_each_forward):
    def couple(objective):
        objective.objective.accumulate_gradients = lambda model, outputs, batches, backward: 1 / 0
        return replace(objective, couples_rows=True)

    run = build(tiny_fast_vlm, wrap=couple)
    with pytest.raises(ZeroDivisionError):
        run.trainer.train(run.examples)
    assert run.trainer.plan.lengths is None
