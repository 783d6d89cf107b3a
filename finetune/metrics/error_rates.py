"""The metrics CER and WER: the edits that turn answers into their references, for each character or word of these.

Edits and lengths are summed over all rows, as in jiwer. Of several references, the one with the fewest edits for its
length counts. The values are from 0 on, and above 1 where answers are much longer than references.
"""

from __future__ import annotations

from functools import lru_cache
from typing import TYPE_CHECKING

from finetune.metrics.edit_distance import edit_distance
from finetune.metrics.texts import answer_text

if TYPE_CHECKING:
    from collections.abc import Sequence

    from finetune.core.example import Example
    from finetune.core.prediction import Prediction
    from finetune.metrics.texts import NormalizeOptions


class _ErrorRate:
    """Edits over all rows, for each item of the references.

    Args:
        options: the section of the task, with the normalization of answers.
    """

    key: str
    of_words: bool
    unit = None
    higher_is_better = False

    def __init__(self, options: NormalizeOptions):
        self._normalize = options.normalize

    def corpus(self, predictions: Sequence[Prediction], examples: Sequence[Example]) -> float:
        """Return the error rate, from 0 on; a smaller one is better.

        Raises:
            DataError: a prediction is neither a text nor a label.
        """
        pairs = zip(predictions, examples, strict=True)
        texts = [self._normalize(answer_text(prediction, example, metric=self.key)) for prediction, example in pairs]
        references = [[self._normalize(reference) for reference in example.answers] for example in examples]
        return error_rate(texts, references, of_words=self.of_words)


class Cer(_ErrorRate):
    """The character error rate."""

    key = "cer"
    of_words = False


class Wer(_ErrorRate):
    """The word error rate; words are separated by white space."""

    key = "wer"
    of_words = True


def error_rate(predictions: Sequence[str], references: Sequence[Sequence[str]], *, of_words: bool) -> float:
    """Return the edits of all rows, divided by the items of their references.

    Args:
        predictions: one text for each row.
        references: one or several references for each row.
        of_words: True to compare words, False to compare characters.
    """
    found = [_edits(text, tuple(row), of_words) for text, row in zip(predictions, references, strict=True)]
    return sum(edits for edits, _ in found) / max(1, sum(length for _, length in found))


@lru_cache(maxsize=1 << 16)  # an interval measures the same rows some hundred times
def _edits(text: str, references: tuple[str, ...], of_words: bool) -> tuple[int, int]:
    """Return the edits to the reference with the fewest for its length, and that length."""
    own, *others = ([*it.split()] if of_words else [*it] for it in (text, *references))
    counted = [(edit_distance(own, other), len(other)) for other in others]
    return min(counted, key=lambda it: it[0] / max(1, it[1]))
