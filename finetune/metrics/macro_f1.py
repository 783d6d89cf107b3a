"""The metric macro F1: the mean of the labels' F1 scores."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from finetune.metrics.classes import true_and_predicted

if TYPE_CHECKING:
    from collections.abc import Sequence

    from finetune.core.example import Example
    from finetune.core.prediction import Prediction
    from finetune.metrics.texts import NormalizeOptions


class MacroF1:
    """The mean F1 score of the labels that rows have or that were predicted.

    The F1 score of a label is the harmonic mean of its precision and recall; 0 if no row with it is right.

    Args:
        options: the section of the task, with the normalization of answers.
    """

    key = "macro_f1"
    unit = None
    higher_is_better = True

    def __init__(self, options: NormalizeOptions):
        self._normalize = options.normalize

    def corpus(self, predictions: Sequence[Prediction], examples: Sequence[Example]) -> float:
        """Return the macro F1 of some rows."""
        true, predicted, _ = true_and_predicted(predictions, examples, normalize=self._normalize, metric=self.key)
        return macro_f1(true, predicted)


def macro_f1(true: np.ndarray, predicted: np.ndarray) -> float:
    """Return the mean F1 score of the labels that occur in ``true`` or ``predicted``.

    Args:
        true: the number of each row's label, [N].
        predicted: the number of the predicted label, [N].
    """
    count = int(max(true.max(), predicted.max())) + 1
    both = np.bincount(true, minlength=count) + np.bincount(predicted, minlength=count)
    right = np.bincount(true[true == predicted], minlength=count)
    return float((2 * right[both > 0] / both[both > 0]).mean())
