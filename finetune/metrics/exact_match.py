"""The metric exact match: 1 if an answer equals one of its references after normalization, else 0."""

from __future__ import annotations

from typing import TYPE_CHECKING

from finetune.metrics.texts import answer_text

if TYPE_CHECKING:
    from collections.abc import Iterable

    from finetune.core.example import Example
    from finetune.core.prediction import Prediction
    from finetune.metrics.normalization import Normalizer
    from finetune.metrics.texts import NormalizeOptions


class ExactMatch:
    """Exact match: the share of rows whose answer is right.

    Args:
        options: the section of the task, with the normalization of answers.
    """

    key = "exact_match"
    unit = None
    higher_is_better = True
    best_value = 1.0

    def __init__(self, options: NormalizeOptions):
        self._normalize = options.normalize

    def row(self, prediction: Prediction, example: Example) -> float:
        """Return 1 if the text or label equals any reference, else 0.

        Raises:
            DataError: the prediction is neither a text nor a label.
        """
        text = answer_text(prediction, example, metric=self.key)
        return float(exact_match(text, example.answers, normalize=self._normalize))


def exact_match(prediction: str, references: Iterable[str], *, normalize: Normalizer) -> bool:
    """Return whether the prediction equals one of the references after ``normalize``."""
    normalized = normalize(prediction)
    return any(normalized == normalize(reference) for reference in references)
