"""The metric ANLS: how similar an answer is to its closest reference, by the normalized edit distance.

After Biten et al. 2019 (https://arxiv.org/abs/1905.13648), as in the evaluation of DocVQA: a similarity below .5 counts
as 0, so that a wrong answer of a few common letters gets nothing.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from finetune.metrics.edit_distance import edit_distance
from finetune.metrics.texts import answer_text

if TYPE_CHECKING:
    from collections.abc import Iterable

    from finetune.core.example import Example
    from finetune.core.prediction import Prediction
    from finetune.metrics.texts import NormalizeOptions

THRESHOLD = 0.5


class Anls:
    """The average normalized Levenshtein similarity.

    Args:
        options: the section of the task, with the normalization of answers.
    """

    key = "anls"
    unit = None
    higher_is_better = True
    best_value = 1.0

    def __init__(self, options: NormalizeOptions):
        self._normalize = options.normalize

    def row(self, prediction: Prediction, example: Example) -> float:
        """Return the similarity of one row, 0 or from .5 to 1.

        Raises:
            DataError: the prediction is neither a text nor a label.
        """
        text = self._normalize(answer_text(prediction, example, metric=self.key))
        return anls(text, [self._normalize(reference) for reference in example.answers])


def anls(prediction: str, references: Iterable[str]) -> float:
    """Return the similarity of a text to the closest reference, or 0 if it is below the threshold."""
    best = max(_similarity(prediction, reference) for reference in references)
    return best if best >= THRESHOLD else 0.0


def _similarity(one: str, other: str) -> float:
    longest = max(len(one), len(other))
    return 1 - edit_distance(one, other) / longest if longest else 1.0
