"""Several objectives as one; a run minimises the weighted sum of the means of all their terms."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Mapping

    from finetune.core.batch import Batch
    from finetune.interfaces import LossSum, Objective, StepContext


class Weighted:
    """The terms of several objectives, each named ``<objective>.<term>``. All share one forward of a micro-batch.

    Args:
        parts: name of each objective -> its weight, and the objective. No objective couples rows.
    """

    def __init__(self, parts: Mapping[str, tuple[float, Objective]]):
        self.parts = parts
        self.needs_reference = any(objective.needs_reference for _, objective in parts.values())

    def count_items(self, batch: Batch) -> dict[str, int]:
        """Return the number of items that each term sums over."""
        return {
            f"{name}.{term}": count
            for name, (_, objective) in self.parts.items()
            for term, count in objective.count_items(batch).items()
        }

    def terms(self, step: StepContext) -> dict[str, LossSum]:
        """Return every objective's terms with its weight; the sums themselves are not weighted."""
        return {
            f"{name}.{term}": replace(loss, weight=weight * loss.weight)
            for name, (weight, objective) in self.parts.items()
            for term, loss in objective.terms(step).items()
        }
