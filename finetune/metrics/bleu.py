"""The metrics BLEU-1 and BLEU-4: how many of the n-grams of captions their references have.

After Papineni et al. 2002 (https://aclanthology.org/P02-1040), without smoothing, as in the COCO caption evaluation and
in sacreBLEU with ``smooth_method="none"``: counts are summed over all rows, and the reference whose length is closest
counts, the shorter one of two. The values are shares, from 0 to 1.
"""

from __future__ import annotations

import math
from functools import lru_cache
from typing import TYPE_CHECKING, Any

from finetune.metrics.texts import answer_text, ngrams, words

if TYPE_CHECKING:
    from collections import Counter
    from collections.abc import Sequence

    from finetune.core.example import Example
    from finetune.core.prediction import Prediction


class _Bleu:
    """BLEU over all rows, with several references for each.

    Args:
        options: the section of the task; unused, since captions have rules of their own.
    """

    key: str
    order: int
    unit = None
    higher_is_better = True

    def __init__(self, options: Any):
        pass

    def corpus(self, predictions: Sequence[Prediction], examples: Sequence[Example]) -> float:
        """Return BLEU, from 0 to 1.

        Raises:
            DataError: a prediction is neither a text nor a label.
        """
        pairs = zip(predictions, examples, strict=True)
        texts = [answer_text(prediction, example, metric=self.key) for prediction, example in pairs]
        return bleu(texts, [example.answers for example in examples], order=self.order)


class Bleu1(_Bleu):
    """BLEU of single words."""

    key = "bleu_1"
    order = 1


class Bleu4(_Bleu):
    """BLEU of sequences of one to four words."""

    key = "bleu_4"
    order = 4


def bleu(predictions: Sequence[str], references: Sequence[Sequence[str]], *, order: int) -> float:
    """Return the BLEU of captions, from 0 to 1; 0 if no n-gram of some length is right.

    Args:
        predictions: one caption for each row.
        references: one or several references for each row.
        order: the largest number of words of an n-gram.
    """
    counts = [_counts(text, tuple(row), order) for text, row in zip(predictions, references, strict=True)]
    length, reference_length, *rest = map(sum, zip(*counts, strict=True))
    right, total = rest[:order], rest[order:]
    if not all(right):
        return 0.0
    precision = math.fsum(math.log(r / t) for r, t in zip(right, total, strict=True)) / order
    return math.exp(precision + min(0.0, 1 - reference_length / length))


@lru_cache(maxsize=1 << 16)  # an interval measures the same rows some hundred times
def _counts(text: str, references: tuple[str, ...], order: int) -> tuple[int, ...]:
    """Return the words of a caption and of its closest reference, then the right n-grams and all of each length."""
    own, others = words(text), [words(reference) for reference in references]
    found = ngrams(own, order)
    most: Counter[tuple[str, ...]] = ngrams([], order)
    for other in others:
        most |= ngrams(other, order)
    closest = min((abs(len(other) - len(own)), len(other)) for other in others)[1]
    right = [0] * order
    for gram, count in (found & most).items():
        right[len(gram) - 1] += count
    return (len(own), closest, *right, *(max(0, len(own) - n) for n in range(order)))
