"""The metric ROUGE-L: the longest common subsequence of a caption's words and a reference's, as an F-measure.

After Lin 2004 (https://aclanthology.org/W04-1013), with the F-measure of Google's rouge-score: precision and recall
count alike, and the best reference counts. The COCO caption evaluation has other values: it weighs recall more (beta
1.2), and takes the best precision and the best recall of different references.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from finetune.metrics.texts import answer_text, words

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from finetune.core.example import Example
    from finetune.core.prediction import Prediction


class RougeL:
    """The mean of the rows' ROUGE-L.

    Args:
        options: the section of the task; unused, since captions have rules of their own.
    """

    key = "rouge_l"
    unit = None
    higher_is_better = True
    best_value = 1.0

    def __init__(self, options: Any):
        pass

    def row(self, prediction: Prediction, example: Example) -> float:
        """Return the ROUGE-L of one row, from 0 to 1.

        Raises:
            DataError: the prediction is neither a text nor a label.
        """
        return rouge_l(answer_text(prediction, example, metric=self.key), example.answers)


def rouge_l(prediction: str, references: Iterable[str]) -> float:
    """Return the F-measure of the longest common subsequence, of the best reference."""
    own = words(prediction)
    return max(_f_measure(own, words(reference)) for reference in references)


def _f_measure(one: Sequence[str], other: Sequence[str]) -> float:
    common = _longest_common(one, other)
    return 2 * common / (len(one) + len(other)) if common else 0.0


def _longest_common(one: Sequence[str], other: Sequence[str]) -> int:
    """Return the length of the longest common subsequence; a column of the usual table is the bits of a number.

    After Hyyrö 2004 (Bit-parallel LCS-length computation revisited).
    """
    places: dict[str, int] = {}
    for i, word in enumerate(one):
        places[word] = places.get(word, 0) | 1 << i
    all_bits = column = (1 << len(one)) - 1
    for word in other:
        matched = column & places.get(word, 0)
        column = ((column + matched) | (column - matched)) & all_bits
    return len(one) - column.bit_count()
