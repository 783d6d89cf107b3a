"""Out-of-memory errors, and smaller micro-batches after one."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import torch
from accelerate.utils.memory import clear_device_cache, should_reduce_batch_size

from finetune.errors import TrainingError

if TYPE_CHECKING:
    from accelerate import Accelerator

    from finetune.training.plan import Plan


def is_out_of_memory(error: BaseException) -> bool:
    """Return whether ``error`` means that a device, or the CPU's allocator, had no memory left."""
    return isinstance(error, torch.OutOfMemoryError) or (
        isinstance(error, Exception) and (should_reduce_batch_size(error) or "can't allocate memory" in str(error))
    )


def any_process(accelerator: Accelerator, flag: bool) -> bool:
    """Return whether ``flag`` is set on any process, the same on all of them."""
    if accelerator.num_processes == 1:
        return flag
    vector = torch.tensor([float(flag)], device=accelerator.device)
    return bool(accelerator.reduce(vector, "sum").item())


def free_memory() -> None:
    """Free unreferenced memory; call it outside the ``except`` block, whose traceback still holds tensors."""
    clear_device_cache(garbage_collection=True)


def halved(plan: Plan, step: int) -> Plan:
    """Return the plan with micro-batches of half as many rows, and as many rows a step as before.

    Args:
        plan: the plan whose micro-batches did not fit.
        step: the number of the step that ran out of memory, from 1.

    Raises:
        TrainingError: a micro-batch is already a single row.
    """
    if plan.batch_size == 1:
        raise TrainingError(
            f"step {step}: out of memory with a micro-batch of one row. Use smaller images or shorter rows, adapt "
            "fewer modules (method.towers), set model.dtype: bfloat16, or use a device with more memory."
        )
    return replace(plan, batch_size=plan.batch_size // 2)


def describe_halved(plan: Plan) -> str:
    """Return the line for the user about the plan that ``halved`` returned."""
    return (
        f"The step is repeated with micro-batches of {plan.batch_size}, {plan.accumulation} to a step: "
        f"{plan.total_batch_size} rows, as before. The run continues with these."
    )


def too_much(plan: Plan, step: int) -> TrainingError:
    """Return the error of a step that cannot be repeated, because processes wait for one another within it."""
    return TrainingError(
        f"step {step}: out of memory with micro-batches of {plan.batch_size}. Processes that share one base cannot "
        "repeat a step. Start the run with a smaller train.batch_size and more train.gradient_accumulation_steps, or "
        "with train.gradient_checkpointing: true."
    )
