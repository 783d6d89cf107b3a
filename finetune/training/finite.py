"""Losses and gradients that are not finite, and the rows that cause them."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch
from accelerate.utils import gather_object

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from transformers import PreTrainedModel

    from finetune.core.batch import Batch
    from finetune.core.example import Example
    from finetune.training.accumulation import LossSums
    from finetune.training.step import TaskObjective


def explain_not_finite(
    model: PreTrainedModel,
    objective: TaskObjective,
    collate: Callable[[list[tuple[Example, bool]]], Batch] | None,
    micro_batches: Sequence[Batch],
    sums: Sequence[LossSums],
    *,
    loss: float,
    norm: float,
) -> str:
    """Return a text with the term that is not finite and the ids of its rows; every process has to call it.

    The loss of each row is computed alone, for every micro-batch whose loss is not finite. The text names the rows
    whose own loss is not finite. If there are none, it names the rows of these micro-batches; if only the gradient is
    not finite, all rows of the step.

    Args:
        model: the model with the weights before the step.
        objective: the terms.
        collate: the function that makes a training batch of (example, supervised) pairs; None computes no row alone.
        micro_batches: the micro-batches of this process.
        sums: the sums of the terms of each micro-batch.
        loss: the loss of the step, over all processes.
        norm: the norm of the step's gradient.
    """
    device, dtype = model.device, model.dtype

    def is_finite(terms: LossSums) -> bool:
        return all(bool(torch.isfinite(term.loss_sum)) for term in terms.values())

    suspects = [
        example
        for batch, terms in zip(micro_batches, sums, strict=True)
        if not is_finite(terms)
        for example in batch.examples
    ]
    alone = []
    with torch.no_grad():
        for example in suspects if collate else ():
            assert collate is not None
            terms = objective.terms(model, collate([(example, True)]).to(device, dtype))
            if not is_finite(terms):
                alone.append(example.id)
    alone, suspected = gather_object(alone), gather_object([example.id for example in suspects])
    every = gather_object([example.id for batch in micro_batches for example in batch.examples])
    what = f"the gradient is not finite (norm {norm})" if math.isfinite(loss) else f"the loss is not finite ({loss})"
    ids = list(dict.fromkeys(alone or suspected or every))
    which = "Rows whose own loss is not finite" if alone else "Rows"
    return f"{what}. {which}: {', '.join(ids[:32])}{' ...' if len(ids) > 32 else ''}."
