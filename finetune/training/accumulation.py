"""The gradient of one optimizer step: the sum over its micro-batches, divided by counts."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import torch

from finetune.interfaces import LossSum

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from accelerate import Accelerator
    from torch import Tensor

    from finetune.core.batch import Batch
    from finetune.training.replicated import Replicated
    from finetune.training.step import TaskObjective

LossSums = dict[str, LossSum]  # term -> its sum, detached


def count_step_items(
    objective: TaskObjective, micro_batches: Sequence[Batch], accelerator: Accelerator
) -> dict[str, int]:
    """Count each term's items, and ``tokens``, over the step and all processes."""
    inputs = [batch.inputs for batch in micro_batches]
    masks = [tensors["attention_mask"] for tensors in inputs if "attention_mask" in tensors]  # images have none
    counts = {"tokens": sum(int(mask.sum()) for mask in masks)}
    for batch in micro_batches:
        for name, count in objective.count_items(batch).items():
            counts[name] = counts.get(name, 0) + count
    if accelerator.num_processes == 1:
        return counts
    vector = torch.tensor(list(counts.values()), device=accelerator.device)
    return dict(zip(counts, accelerator.reduce(vector, "sum").tolist(), strict=True))


def accumulate_gradients(
    strategy: Replicated,
    objective: TaskObjective,
    micro_batches: Sequence[Batch],
    totals: Mapping[str, int],
    dtype: torch.dtype,
) -> list[LossSums]:
    """Run the micro-batches of a step forward and backward.

    The gradients are whole after the strategy's ``add_up_gradients``.

    Args:
        strategy: the strategy, which has the model and runs each micro-batch.
        objective: the objective with the terms.
        micro_batches: the micro-batches of the step, not yet on the device.
        totals: each term -> the number of its items in the step over all processes, by which its sum is divided.
        dtype: the dtype of the images.

    Returns:
        The sum of each term, for each micro-batch.
    """
    device, left = strategy.accelerator.device, len(micro_batches)

    def backward(loss: Callable[[], Tensor]) -> None:
        nonlocal left
        left -= 1
        strategy.backward(loss, last=left == 0)

    if objective.couples_rows:
        # Counted on the CPU, so it does not wait for the device.
        counts = [objective.count_items(batch) for batch in micro_batches]
        batches = [batch.to(device, dtype) for batch in micro_batches]
        parts = objective.accumulate_gradients(strategy.model, batches, backward)
        return [{n: LossSum(part[n], count[n]) for n in part} for part, count in zip(parts, counts, strict=True)]
    sums: list[LossSums] = []
    for batch in micro_batches:

        def loss(batch: Batch = batch) -> Tensor:
            terms = objective.terms(strategy.model, batch.to(device, dtype))
            sums.append({name: replace(term, loss_sum=term.loss_sum.detach()) for name, term in terms.items()})
            shares = [term.loss_sum * (term.weight / max(1, totals[name])) for name, term in terms.items()]
            return torch.stack(shares).sum()

        backward(loss)
    return sums
