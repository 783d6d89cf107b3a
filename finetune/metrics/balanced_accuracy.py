"""The metric balanced accuracy: the mean over labels of the share of their rows that are right."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from finetune.metrics.classes import true_and_predicted

if TYPE_CHECKING:
    from collections.abc import Sequence

    from finetune.core.example import Example
    from finetune.core.prediction import Prediction
    from finetune.metrics.texts import NormalizeOptions


class BalancedAccuracy:
    """The mean recall of the labels that rows have, so that a frequent label counts no more than a rare one.

    Args:
        options: the section of the task, with the normalization of answers.
    """

    key = "balanced_accuracy"
    unit = None
    higher_is_better = True

    def __init__(self, options: NormalizeOptions):
        self._normalize = options.normalize

    def corpus(self, predictions: Sequence[Prediction], examples: Sequence[Example]) -> float:
        """Return the balanced accuracy of some rows."""
        true, predicted, _ = true_and_predicted(predictions, examples, normalize=self._normalize, metric=self.key)
        return balanced_accuracy(true, predicted)


def balanced_accuracy(true: np.ndarray, predicted: np.ndarray) -> float:
    """Return the mean recall of the labels that occur in ``true``.

    Args:
        true: the number of each row's label, [N].
        predicted: the number of the predicted label, [N].
    """
    rows = np.bincount(true)
    right = np.bincount(true[true == predicted], minlength=len(rows))
    return float((right[rows > 0] / rows[rows > 0]).mean())
