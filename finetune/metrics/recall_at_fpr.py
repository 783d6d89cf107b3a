"""The metric recall at a false positive rate: the share of the rows with one label that can be found at that rate."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from finetune.errors import RecipeError
from finetune.metrics.auroc import one_against_rest

if TYPE_CHECKING:
    from collections.abc import Sequence
    from typing import Protocol

    from finetune.core.example import Example
    from finetune.core.prediction import Prediction
    from finetune.metrics.texts import NormalizeOptions

    class Options(NormalizeOptions, Protocol):
        """The section of a task with a positive label."""

        positive_label: str | None
        false_positive_rate: float


class RecallAtFpr:
    """The highest recall of the positive label at which the share of other rows that count as it is small enough.

    A row counts as positive if its score for the label is at least a threshold; the metric takes the best threshold.

    Args:
        options: the section of the task, with the positive label and the largest false positive rate.

    Raises:
        RecipeError: the section names no positive label.
    """

    key = "recall_at_fpr"
    unit = None
    higher_is_better = True

    def __init__(self, options: Options):
        if getattr(options, "positive_label", None) is None:
            raise RecipeError(
                f"the metric {self.key} needs task.positive_label, got none. Set it to the label whose rows must be "
                "found, or take the metric out of task.metrics."
            )
        self._normalize, self._label, self._rate = (
            options.normalize,
            options.positive_label,
            options.false_positive_rate,
        )

    def corpus(self, predictions: Sequence[Prediction], examples: Sequence[Example]) -> float | None:
        """Return the recall of some rows; None if all of them have the positive label, or none has it."""
        found = one_against_rest(predictions, examples, normalize=self._normalize, metric=self.key)
        has_label, scores = found.get(self._normalize(str(self._label)), (np.zeros(0, bool), np.zeros(0)))
        return recall_at_fpr(has_label, scores, self._rate) if 0 < has_label.sum() < len(has_label) else None


def recall_at_fpr(has_label: np.ndarray, scores: np.ndarray, rate: float) -> float:
    """Return the highest recall of a label at which the false positive rate is at most ``rate``.

    Args:
        has_label: whether each row has the label, bool [N]; some rows have it, and others have not.
        scores: the score of each row, [N].
        rate: the largest share of the other rows whose score may reach the threshold.
    """
    negative = np.sort(scores[~has_label])[::-1]
    allowed = int(np.floor(rate * len(negative) + 1e-9))  # 1e-9: .05 * 20 rows are one row
    if allowed >= len(negative):
        return 1.0
    return float((scores[has_label] > negative[allowed]).mean())  # the first negative row that must stay below
