"""The gradient of one optimizer step: the backward passes of its micro-batches, added up by counts."""

from __future__ import annotations

from typing import TYPE_CHECKING, cast

import torch

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from accelerate import Accelerator
    from torch import Tensor, nn

    from finetune.interfaces import Batch, CoupledTask, Task

LossSums = dict[str, "Tensor"]  # term -> scalar, detached


def count_window(task: Task, window: Sequence[Batch], accelerator: Accelerator) -> dict[str, int]:
    """Adds up each term's items, and ``tokens``, over the window and all processes."""
    counts = {"tokens": sum(int(batch.inputs["attention_mask"].sum()) for batch in window)}
    for batch in window:
        for name, count in task.count_items(batch).items():
            counts[name] = counts.get(name, 0) + count
    if accelerator.num_processes == 1:
        return counts
    vector = torch.tensor(list(counts.values()), device=accelerator.device)
    return dict(zip(counts, accelerator.reduce(vector, "sum").tolist(), strict=True))


def backward_window(
    model: nn.Module,
    task: Task,
    window: Sequence[Batch],
    totals: Mapping[str, int],
    accelerator: Accelerator,
    dtype: torch.dtype,
) -> list[LossSums]:
    """Runs the window forward and backward; gradients stay this process's own until ``add_up_gradients``.

    Args:
        model: as ``accelerator.prepare`` returned it.
        task: the terms.
        window: micro-batches, not yet on the device.
        totals: term -> items in the window over all processes; each term's sum is divided by its own.
        accelerator: of the run.
        dtype: of the pictures.

    Returns:
        For each micro-batch the sum of each term.
    """

    def backward(loss: Callable[[], Tensor]) -> None:
        # No process waits for another here: one of them may run out of memory.
        with accelerator.no_sync(model):
            with accelerator.autocast():
                value = loss()
            if value.requires_grad:  # rows without a picture reach nothing that trains in a vision tower
                accelerator.backward(value)

    if task.couples_rows:
        batches = [batch.to(accelerator.device, dtype) for batch in window]
        return cast("CoupledTask", task).backward_window(model, batches, backward)
    sums: list[LossSums] = []
    for batch in window:

        def loss(batch: Batch = batch) -> Tensor:
            terms = task.terms(model, batch.to(accelerator.device, dtype))
            sums.append({name: term.loss_sum.detach() for name, term in terms.items()})
            return torch.stack([term.loss_sum * (1 / max(1, totals[name])) for name, term in terms.items()]).sum()

        backward(loss)
    return sums


def add_up_gradients(parameters: Sequence[nn.Parameter], accelerator: Accelerator) -> None:
    """Adds up the gradients of all processes, in one flat vector; what none of them has stays None."""
    if accelerator.num_processes == 1:
        return
    pieces = [torch.zeros_like(p) if p.grad is None else p.grad for p in parameters]
    reached = pieces[0].new_tensor([p.grad is not None for p in parameters])
    flat = accelerator.reduce(torch.cat([*(piece.flatten() for piece in pieces), reached]), "sum")
    *pieces, reached = flat.split([*(p.numel() for p in parameters), len(parameters)])
    for parameter, piece, count in zip(parameters, pieces, reached.tolist(), strict=True):
        parameter.grad = piece.view_as(parameter).clone() if count else None
