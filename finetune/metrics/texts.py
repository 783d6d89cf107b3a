"""The texts that metrics compare: those of predictions, their words, and their n-grams."""

from __future__ import annotations

import re
import unicodedata
from collections import Counter
from typing import TYPE_CHECKING, Any, Protocol

from finetune.core.prediction import Label, Text
from finetune.errors import DataError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from finetune.core.example import Example
    from finetune.core.prediction import Prediction
    from finetune.metrics.normalization import Normalizer

_CLITIC = re.compile(r"(n't|'(?:s|m|d|re|ve|ll))\b")
_WORD = re.compile(r"n't\b|'(?:s|m|d|re|ve|ll)\b|\d+(?:[.,:]\d+)+|\w+(?:-\w+)*")


class NormalizeOptions(Protocol):
    """The section of a task that normalizes answers."""

    @property
    def normalize(self) -> Normalizer:
        """Return the function that normalizes answers before they are compared."""
        ...


def answer_text(prediction: Prediction, example: Example, *, metric: str) -> str:
    """Return the text of a prediction.

    Args:
        prediction: the prediction of a row.
        example: the row, for errors.
        metric: the name of the metric, for errors.

    Raises:
        DataError: the prediction is neither a text nor a label.
    """
    require(prediction, example, Text | Label, "a text or a label", metric=metric)
    return str(prediction)


def require(prediction: Prediction, example: Example, kind: Any, what: str, *, metric: str) -> None:
    """Check that a prediction is of the kind that a metric takes.

    Raises:
        DataError: it is of another kind.
    """
    if not isinstance(prediction, kind):
        raise DataError(
            f"{metric} needs {what}, got a prediction of type {prediction.type} (row {example.id}). Set other metrics "
            "in task.metrics."
        )


def words(text: str) -> list[str]:
    """Return the words of a caption in lower case, without punctuation.

    After the tokenizer of the COCO caption evaluation, which is Stanford's PTBTokenizer and needs Java: contractions
    are two words (``do n't``, ``man 's``), words with hyphens and numbers with separators are one. It differs where
    that tokenizer keeps symbols such as ``&`` and ``$`` as words, which are dropped here, splits a few other words
    (``cannot``), and joins abbreviations with their periods (``u.s.``).
    """
    lower = unicodedata.normalize("NFC", text).lower().replace("’", "'")
    return _WORD.findall(_CLITIC.sub(r" \1", lower))


def ngrams(tokens: Sequence[str], order: int) -> Counter[tuple[str, ...]]:
    """Return how often each sequence of 1 to ``order`` tokens occurs."""
    return Counter(tuple(tokens[i : i + n]) for n in range(1, order + 1) for i in range(len(tokens) - n + 1))
