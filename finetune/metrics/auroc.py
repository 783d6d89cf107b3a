"""The metric AUROC: the area under the ROC curve of each label against the rest, as the mean over labels."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from finetune.core.prediction import Label
from finetune.metrics.texts import require

if TYPE_CHECKING:
    from collections.abc import Sequence

    from finetune.core.example import Example
    from finetune.core.prediction import Prediction
    from finetune.metrics.normalization import Normalizer
    from finetune.metrics.texts import NormalizeOptions


class Auroc:
    """The mean area under the ROC curves of the labels that some of the rows have, and others have not.

    The area is the chance that a row with the label has a higher score for it than a row with another label; equal
    scores count half. A label without a score has the score 0.

    Args:
        options: the section of the task, with the normalization of answers.
    """

    key = "auroc"
    unit = None
    higher_is_better = True

    def __init__(self, options: NormalizeOptions):
        self._normalize = options.normalize

    def corpus(self, predictions: Sequence[Prediction], examples: Sequence[Example]) -> float | None:
        """Return the mean area of some rows; None if all of them have the same label."""
        areas = []
        for has_label, scores in one_against_rest(
            predictions, examples, normalize=self._normalize, metric=self.key
        ).values():
            if 0 < has_label.sum() < len(has_label):
                areas.append(area_under_roc(has_label, scores))
        return float(np.mean(areas)) if areas else None


def one_against_rest(
    predictions: Sequence[Prediction], examples: Sequence[Example], *, normalize: Normalizer, metric: str
) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Return for each label whether rows have it, and its scores.

    Args:
        predictions: one label for each row.
        examples: the rows; a row's label is its first reference.
        normalize: the function that normalizes answers before they are compared.
        metric: the name of the metric, for errors.

    Returns:
        The normalized text of a label that some row has -> bool [N] and fp64 [N].

    Raises:
        DataError: a prediction is no label with scores.
    """
    own = [normalize(example.answers[0]) for example in examples]
    labels = list(dict.fromkeys(own))
    column = {label: i for i, label in enumerate(labels)}
    written: dict[str, int | None] = {}  # a label as predictions write it -> its column
    scores = np.zeros((len(labels), len(examples)))
    for row, (prediction, example) in enumerate(zip(predictions, examples, strict=True)):
        require(prediction, example, Label, "labels with scores", metric=metric)
        assert isinstance(prediction, Label)
        for label, score in prediction.scores.items():
            if label not in written:
                written[label] = column.get(normalize(label))
            if (place := written[label]) is not None:
                scores[place, row] = score
    numbers = np.array([column[label] for label in own])
    return {label: (numbers == i, scores[i]) for label, i in column.items()}


def area_under_roc(has_label: np.ndarray, scores: np.ndarray) -> float:
    """Return the area under the ROC curve.

    Args:
        has_label: whether each row has the label, bool [N]; some rows have it, and others have not.
        scores: the score of each row, [N].
    """
    _, place, count = np.unique(scores, return_inverse=True, return_counts=True)
    ranks = (count.cumsum() - (count - 1) / 2)[place]  # from 1; rows with equal scores share the mean of their ranks
    positive = int(has_label.sum())
    negative = len(has_label) - positive
    return float((ranks[has_label].sum() - positive * (positive + 1) / 2) / (positive * negative))
