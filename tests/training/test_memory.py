"""Out of memory: half the micro-batch, the same step, the same adapter."""

import pytest
import torch

from finetune.errors import TrainingError
from finetune.recipe import TrainSection
from finetune.training.memory import halved, is_out_of_memory
from finetune.training.plan import Plan


def at_most(rows, seen):
    """Fails like a device on which more than ``rows`` do not fit."""

    def before(batch):
        seen.append(len(batch.examples))
        torch.rand(3)  # what dropout draws before it fails must not be missed when the step is taken again
        if len(batch.examples) > rows:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")

    return before


@pytest.mark.parametrize("first", [0, 3])
def test_half_the_micro_batch_gives_the_adapter_of_the_smaller_one(
    build, tiny_base, before_each_forward, capsys, first
):
    """Memory runs out in the first step, or later; 18 rows in steps of 8 leave a partial one."""
    options = {"max_steps": 6, "learning_rate": 1e-3, "eval_steps": 100}
    small = build(tiny_base, batch_size=2, gradient_accumulation_steps=4, **options)
    small.trainer.train(small.examples)
    seen = []
    fail = at_most(2, seen)
    run = build(
        tiny_base,
        batch_size=8,
        wrap=before_each_forward(lambda batch: fail(batch) if run.trainer.state.step >= first else None),
        **options,
    )
    state = run.trainer.train(run.examples)
    worst = max((run.weights()[name] - tensor).abs().max().item() for name, tensor in small.weights().items())
    assert worst < 1e-5
    assert seen[:3] == [8, 4, 2] and state.batch_size == 2
    output = capsys.readouterr().out
    assert f"step {first + 1}: out of memory." in output and "micro-batches of 2, 4 to a step: 8 rows" in output
    assert [line["step"] for line in run.lines()] == list(range(1, 7)), "no step is logged twice"


def test_the_gradients_of_a_step_that_failed_half_way_are_dropped(build, tiny_fast_vlm, before_each_forward):
    """Memory runs out in the second of two micro-batches."""
    options = {"max_steps": 4, "learning_rate": 1e-3, "eval_steps": 100}
    small = build(tiny_fast_vlm, batch_size=2, gradient_accumulation_steps=4, **options)
    small.trainer.train(small.examples)
    seen = []

    def before(batch):
        seen.append(len(batch.examples))
        if seen == [4, 4]:
            raise torch.OutOfMemoryError("CUDA out of memory.")

    run = build(tiny_fast_vlm, batch_size=4, gradient_accumulation_steps=2, wrap=before_each_forward(before), **options)
    run.trainer.train(run.examples)
    assert seen[:6] == [4, 4, 2, 2, 2, 2]
    assert max((run.weights()[name] - tensor).abs().max().item() for name, tensor in small.weights().items()) < 1e-5


def test_the_step_is_taken_again_with_the_same_randomness(build, tiny_fast_vlm, before_each_forward):
    """With dropout, a step that failed after drawing from the generator equals one that never failed."""
    results = []
    for fails in (False, True):
        failed = []

        def before(batch, fails=fails, failed=failed):
            if fails and not failed and len(batch.examples) == 4:
                failed.append(torch.rand(5))
                raise RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to allocate")

        run = build(
            tiny_fast_vlm,
            dropout=0.3,
            max_steps=3,
            batch_size=4 if fails else 2,
            gradient_accumulation_steps=1 if fails else 2,
            wrap=before_each_forward(before),
        )
        run.trainer.train(run.examples)
        assert len(failed) == fails
        results.append(run.weights())
    worst = max((results[0][name] - results[1][name]).abs().max().item() for name in results[0])
    assert worst < 1e-5


def test_one_row_that_does_not_fit_is_an_error(build, tiny_fast_vlm, before_each_forward):
    run = build(tiny_fast_vlm, batch_size=4, wrap=before_each_forward(at_most(0, [])))
    with pytest.raises(TrainingError, match="step 1: out of memory with a micro-batch of one row. Use smaller"):
        run.trainer.train(run.examples)


def test_another_error_is_not_hidden(build, tiny_fast_vlm, before_each_forward):
    def before(batch):
        raise RuntimeError("mat1 and mat2 shapes cannot be multiplied")

    run = build(tiny_fast_vlm, wrap=before_each_forward(before))
    with pytest.raises(RuntimeError, match="mat1 and mat2"):
        run.trainer.train(run.examples)


def test_what_counts():
    assert is_out_of_memory(torch.OutOfMemoryError())
    assert is_out_of_memory(RuntimeError("MPS backend out of memory (MPS allocated: 1 GB)"))
    assert is_out_of_memory(RuntimeError("std: can't allocate memory"))
    assert not is_out_of_memory(RuntimeError("shape mismatch"))


@pytest.mark.parametrize(("size", "accumulation"), [(5, 1), (3, 3), (8, 2)])
def test_an_odd_micro_batch_keeps_the_rows_of_a_step(size, accumulation):
    options = TrainSection(epochs=2.0, batch_size=size, gradient_accumulation_steps=accumulation)
    plan = Plan.of(options, num_rows=22, num_processes=2, seed=1)
    half = halved(plan, 1)
    assert (
        half.batch_size == size // 2
        and half.total_batch_size == plan.total_batch_size
        and half.total_steps == plan.total_steps
    )
    for step in range(plan.total_steps):
        rows = [
            d.row for process in (0, 1) for batch in half.micro_batches(step, process) for d in batch if d.supervised
        ]
        assert sorted(rows) == sorted(plan.rows(step).tolist())
