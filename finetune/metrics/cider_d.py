"""The metric CIDEr-D: how similar captions are to their references by n-grams, of which rare ones count more.

After Vedantam et al. 2015 (https://arxiv.org/abs/1411.5726) and the COCO caption evaluation (pycocoevalcap/cider):
n-grams of 1 to 4 words, sigma 6, document frequencies from the references of the rows that are evaluated. So a value
holds for these rows alone, and a part of them has another one. Values are from 0 to 10.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from finetune.metrics.texts import answer_text, ngrams, words

if TYPE_CHECKING:
    from collections.abc import Sequence

    from finetune.core.example import Example
    from finetune.core.prediction import Prediction

ORDER = 4
SIGMA = 6.0  # of the penalty for lengths that differ, in words


class _Row(NamedTuple):
    """The n-grams of one row: G of all its texts, text by text, the caption before its R references."""

    grams: np.ndarray  # their numbers [G]
    places: np.ndarray  # ORDER * the number of the text + the length of the n-gram - 1 [G]
    squares: np.ndarray  # the square of how often the text has the n-gram [G]
    products: np.ndarray  # the smaller count of caption and reference, times that of the reference [G]
    documents: np.ndarray  # the numbers of the n-grams of all references, each once [D]
    penalties: np.ndarray  # of each text [1 + R]


class CiderD:
    """CIDEr-D over all rows, with several references for each.

    Args:
        options: the section of the task; unused, since captions have rules of their own.
    """

    key = "cider_d"
    unit = None
    higher_is_better = True

    def __init__(self, options: Any):
        self._numbers: dict[tuple[str, ...], int] = {}
        self._rows: dict[tuple[str, ...], _Row] = {}  # an interval measures the same rows some hundred times

    def corpus(self, predictions: Sequence[Prediction], examples: Sequence[Example]) -> float:
        """Return CIDEr-D, from 0 to 10.

        Raises:
            DataError: a prediction is neither a text nor a label.
        """
        rows = []
        for prediction, example in zip(predictions, examples, strict=True):
            texts = (answer_text(prediction, example, metric=self.key), *example.answers)
            if texts not in self._rows:
                self._rows[texts] = _row(texts, self._numbers)
            rows.append(self._rows[texts])
        return float(_scores(rows, len(self._numbers)).mean())


def cider_d(predictions: Sequence[str], references: Sequence[Sequence[str]]) -> list[float]:
    """Return the CIDEr-D of each row; their mean is that of all rows.

    Args:
        predictions: one caption for each row.
        references: one or several references for each row.
    """
    numbers: dict[tuple[str, ...], int] = {}
    rows = [_row((text, *others), numbers) for text, others in zip(predictions, references, strict=True)]
    found: list[float] = _scores(rows, len(numbers)).tolist()
    return found


def _row(texts: Sequence[str], numbers: dict[tuple[str, ...], int]) -> _Row:
    """Return the n-grams of a caption and its references, with their numbers."""
    tokens = [words(text) for text in texts]
    counts = [ngrams(one, ORDER) for one in tokens]
    entries = [
        (numbers.setdefault(gram, len(numbers)), ORDER * i + len(gram) - 1, n * n, min(n, counts[0][gram]) * n)
        for i, found in enumerate(counts)
        for gram, n in found.items()
    ]
    grams, places, squares, products = np.array(entries, dtype=int).reshape(-1, 4).T
    documents = np.unique(grams[places >= ORDER])
    apart = np.array([len(tokens[0]) - len(one) for one in tokens])
    return _Row(grams, places, squares, products, documents, np.exp(-(apart**2) / (2 * SIGMA**2)))


def _scores(rows: Sequence[_Row], num_grams: int) -> np.ndarray:
    """Return the CIDEr-D of each row, [rows].

    Weights are the squares of idf: each term of a dot product and of a norm has the idf of one n-gram twice.
    """
    frequencies = np.bincount(np.concatenate([row.documents for row in rows]), minlength=num_grams)
    weights = (math.log(len(rows)) - np.log(np.maximum(1, frequencies))) ** 2
    texts = np.array([len(row.penalties) for row in rows])
    first = np.cumsum(texts) - texts  # the number of each row's caption among all texts
    grams = np.concatenate([row.grams for row in rows])
    places = np.concatenate([row.places + ORDER * start for row, start in zip(rows, first, strict=True)])

    def sums(name: str) -> np.ndarray:  # of each text and length of n-grams, [texts, ORDER]
        values = np.concatenate([getattr(row, name) for row in rows]) * weights[grams]
        return np.bincount(places, values, minlength=ORDER * int(texts.sum())).reshape(-1, ORDER)

    squares, dots = sums("squares"), sums("products")
    norms = np.sqrt(squares * np.repeat(squares[first], texts, axis=0))
    cosines = np.divide(dots, norms, out=np.zeros_like(dots), where=norms > 0).mean(axis=1)  # [texts]
    cosines *= np.concatenate([row.penalties for row in rows])
    cosines[first] = 0  # the caption itself is no reference
    found: np.ndarray = 10 * np.add.reduceat(cosines, first) / (texts - 1)
    return found
