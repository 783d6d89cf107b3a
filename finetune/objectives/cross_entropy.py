"""Cross entropy of the supervised tokens, each predicted from the tokens before it."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from finetune.interfaces import LossSum

if TYPE_CHECKING:
    from finetune.core.batch import Batch
    from finetune.interfaces import StepContext
    from finetune.recipe import CrossEntropySection


class CrossEntropy:
    """One term, ``answer``: the next-token loss of the supervised tokens.

    Args:
        options: the section of the recipe.
    """

    needs_reference = False

    def __init__(self, options: CrossEntropySection):
        self.options = options

    def count_items(self, batch: Batch) -> dict[str, int]:
        """Return the number of supervised tokens."""
        assert batch.targets is not None
        return {"answer": len(batch.targets.tokens)}

    def terms(self, step: StepContext) -> dict[str, LossSum]:
        """Return the summed cross entropy, in nats."""
        targets = step.batch.targets
        assert targets is not None
        logits = step.forward()  # [N, V]
        loss = torch.nn.functional.cross_entropy(logits.float(), targets.tokens, reduction="sum")
        return {"answer": LossSum(loss, len(targets.tokens))}
