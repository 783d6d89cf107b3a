"""Stopping and going on, in one process: bit for bit as if nothing had happened."""

import errno
import json
import os
import random
import signal

import numpy as np
import pytest
import torch

from finetune.errors import StoppedError, TrainingError
from finetune.training.randomness import random_state, set_random_state
from finetune.training.validation import Validation

RATES = {"samples_per_s", "tokens_per_s"}
OPTIONS = {"epochs": 2.0, "batch_size": 4, "eval_steps": 2, "save_steps": 3, "early_stopping_patience": 3}
SCORES = [0.1, 0.3, 0.2, 0.25, 0.25, 0.9]  # the third without a better one ends the run after step 10


def scores_from(trainer):
    return lambda: Validation(values={"exact_match": SCORES[trainer.state.step // 2 - 1]}, loss=1 / trainer.state.step)


def lines_of(run):
    return [{k: v for k, v in line.items() if k not in RATES} for line in run.lines()]


@pytest.fixture(autouse=True)
def signals_are_not_ignored():
    """Ctrl-C is, where the tests run in the background."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def go(run, **options):
    return run.trainer.train(run.examples, validate=scores_from(run.trainer), **options)


@pytest.mark.parametrize(
    ("workers", "signum", "stops"),
    [(0, signal.SIGTERM, (1, 6)), (0, signal.SIGINT, (3, 4, 9)), (2, signal.SIGINT, (7,))],
)
def test_a_stopped_run_goes_on_as_if_it_had_not_stopped(
    build, tiny_fast_vlm, before_each_forward, workers, signum, stops
):
    """18 rows, four a step: step 6 begins the second epoch. Dropout draws in every forward."""
    whole = build(tiny_fast_vlm, dropout=0.2, **OPTIONS)
    expected = go(whole)
    expected_weights, expected_lines = whole.weights(), lines_of(whole)
    assert (expected.step, expected.best_step, expected.best_score) == (10, 4, 0.3)
    whole.checkpoints.clear()

    left = list(stops)

    def before(batch):
        if left and run.trainer.state.step + 1 == left[0]:  # in the middle of that step
            left.pop(0)
            os.kill(os.getpid(), signum)

    for number in range(len(stops) + 1):
        run = build(tiny_fast_vlm, dropout=0.2, num_workers=workers, wrap=before_each_forward(before), **OPTIONS)
        torch.rand(number + 1)  # going on does not depend on what was drawn before
        if number:
            run.trainer.restore(run.checkpoints.newest(print))
            assert run.trainer.state.step == stops[number - 1]
        if number < len(stops):
            with pytest.raises(StoppedError, match=f"stopped after step {stops[number]} of 10; the state is saved in"):
                go(run)
        else:
            state = go(run)
    assert state == expected
    assert all(torch.equal(run.weights()[name], tensor) for name, tensor in expected_weights.items())
    assert all(torch.equal(run.trainer.best[name], tensor) for name, tensor in whole.trainer.best.items())
    assert lines_of(run) == expected_lines
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL


def test_the_exit_code_is_the_signals(build, tiny_fast_vlm, before_each_forward):
    run = build(tiny_fast_vlm, wrap=before_each_forward(lambda batch: os.kill(os.getpid(), signal.SIGTERM)))
    with pytest.raises(StoppedError) as caught:
        go(run)
    assert caught.value.exit_code == 143


def test_a_checkpoint_after_memory_ran_out_goes_on_with_the_smaller_micro_batch(build, tiny_fast_vlm):
    run = build(tiny_fast_vlm, batch_size=4, max_steps=2)
    run.trainer.state.batch_size = 2
    run.trainer.train(run.examples)
    again = build(tiny_fast_vlm, batch_size=4, max_steps=2)
    again.trainer.restore(again.checkpoints.newest(print))
    assert again.trainer.state.batch_size == 2
    again.trainer.train(again.examples)
    assert (again.trainer.plan.batch_size, again.trainer.plan.total_batch_size) == (2, 4)


def test_a_run_that_was_done_trains_no_more(build, tiny_fast_vlm):
    run = build(tiny_fast_vlm, max_steps=2)
    run.trainer.train(run.examples)
    again = build(tiny_fast_vlm, max_steps=2)
    again.trainer.restore(again.checkpoints.newest(print))
    again.trainer.objective.objective.terms = None  # not even asked
    assert again.trainer.train(again.examples).step == 2
    assert len(again.lines()) == 2


def test_what_trains_must_be_what_trained(build, tiny_fast_vlm):
    run = build(tiny_fast_vlm, max_steps=1)
    run.trainer.train(run.examples)
    again = build(tiny_fast_vlm, max_steps=1)
    name = next(iter(again.attachment.parameters))
    again.attachment.parts[0].parameters[name] = torch.nn.Parameter(torch.zeros(3, 3))
    with pytest.raises(
        TrainingError, match=r"but 1 differ, such as .*\(shape \[4, \d+\] in the checkpoint, \[3, 3\] in this run\)"
    ):
        again.trainer.restore(again.checkpoints.newest(print))


def test_a_full_disk_is_logged_and_the_run_continues(build, tiny_fast_vlm, monkeypatch, capsys):
    run = build(tiny_fast_vlm, max_steps=6, save_steps=2)
    write = run.checkpoints.write

    def full_in_the_middle(step, tensors, facts):
        if step == 4:
            raise OSError(errno.ENOSPC, "No space left on device")
        return write(step, tensors, facts)

    monkeypatch.setattr(run.checkpoints, "write", full_in_the_middle)
    assert run.trainer.train(run.examples).step == 6
    output = capsys.readouterr().out
    assert "step 4: the checkpoint could not be written (No space left on device). Earlier checkpoints" in output
    assert [step for step, _ in run.checkpoints._listed()] == [2, 6]


def test_a_full_disk_leaves_no_half_line_in_the_log(build, tiny_fast_vlm, monkeypatch, capsys):
    run = build(tiny_fast_vlm, max_steps=3, save_steps=100)
    dumps, failed = json.dumps, []

    def full(line, **options):
        if line.get("step") == 2 and not failed:
            failed.append(True)
            with run.trainer.log.file.open("a") as file:
                file.write('{"st')
            raise OSError(errno.ENOSPC, "No space left on device")
        return dumps(line, **options)

    monkeypatch.setattr("finetune.training.log.json.dumps", full)
    run.trainer.train(run.examples)
    monkeypatch.undo()
    assert [line["step"] for line in run.lines()] == [1, 3]
    assert "lines are missing from step 2" in capsys.readouterr().out


def test_every_generator_is_put_back():
    state = random_state()
    first = (torch.rand(2).tolist(), random.random(), np.random.rand(), random.gauss(0, 1), np.random.randn())
    set_random_state(state)
    assert (torch.rand(2).tolist(), random.random(), np.random.rand(), random.gauss(0, 1), np.random.randn()) == first


def test_a_run_in_8_bit_goes_on_exactly(build, tiny_fast_vlm, before_each_forward):
    """Its state holds plain numbers and bytes beside floats."""
    options = {**OPTIONS, "optim": "adamw_8bit"}
    whole = build(tiny_fast_vlm, **options)
    go(whole)
    whole.checkpoints.clear()
    left = [4]

    def before(batch):
        if left and run.trainer.state.step + 1 == left[0]:
            left.pop()
            os.kill(os.getpid(), signal.SIGTERM)

    run = build(tiny_fast_vlm, wrap=before_each_forward(before), **options)
    with pytest.raises(StoppedError):
        go(run)
    run = build(tiny_fast_vlm, **options)
    run.trainer.restore(run.checkpoints.newest(print))
    go(run)
    assert all(torch.equal(run.weights()[name], tensor) for name, tensor in whole.weights().items())
