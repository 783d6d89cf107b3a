"""The metrics token recall and token F1: how many words of an answer and its reference are the same, in any order.

Token recall is for open questions, whose answers may say more than the reference. Token F1, as in SQuAD
(https://arxiv.org/abs/1606.05250), also counts words that are too many. Both compare the words of normalized answers
without punctuation, and the best reference counts. Articles count, unless the normalization drops them.
"""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING

from finetune.metrics.texts import answer_text, words

if TYPE_CHECKING:
    from collections.abc import Callable

    from finetune.core.example import Example
    from finetune.core.prediction import Prediction
    from finetune.metrics.texts import NormalizeOptions


def token_recall(prediction: str, reference: str) -> float:
    """Return the share of the reference's words that the prediction has; a word counts as often as it occurs."""
    common, _, of = _overlap(prediction, reference)
    return common / of if of else 0.0


def token_f1(prediction: str, reference: str) -> float:
    """Return the harmonic mean of the precision and the recall of words."""
    common, own, of = _overlap(prediction, reference)
    return 2 * common / (own + of) if common else 0.0


def _overlap(prediction: str, reference: str) -> tuple[int, int, int]:
    """Return the number of common words, and the numbers of words of both texts."""
    own, other = Counter(words(prediction)), Counter(words(reference))
    return (own & other).total(), own.total(), other.total()


class _TokenOverlap:
    """The mean over rows of a value that two texts have.

    Args:
        options: the section of the task, with the normalization of answers.
    """

    key: str
    unit = None
    higher_is_better = True
    best_value = 1.0
    of: Callable[[str, str], float]  # the value of an answer and one reference

    def __init__(self, options: NormalizeOptions):
        self._normalize = options.normalize

    def row(self, prediction: Prediction, example: Example) -> float:
        """Return the value of one row with its best reference, from 0 to 1.

        Raises:
            DataError: the prediction is neither a text nor a label.
        """
        text = self._normalize(answer_text(prediction, example, metric=self.key))
        return max(self.of(text, self._normalize(reference)) for reference in example.answers)


class TokenRecall(_TokenOverlap):
    """The share of a reference's words that the answer has."""

    key = "token_recall"
    of = staticmethod(token_recall)


class TokenF1(_TokenOverlap):
    """The harmonic mean of precision and recall of an answer's words."""

    key = "token_f1"
    of = staticmethod(token_f1)
