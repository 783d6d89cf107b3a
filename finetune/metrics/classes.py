"""The label of each row and the predicted one, as metrics of classification compare them.

Legend of shapes: N rows.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from finetune.metrics.texts import answer_text

if TYPE_CHECKING:
    from collections.abc import Sequence

    from finetune.core.example import Example
    from finetune.core.prediction import Prediction
    from finetune.metrics.normalization import Normalizer


def true_and_predicted(
    predictions: Sequence[Prediction], examples: Sequence[Example], *, normalize: Normalizer, metric: str
) -> tuple[np.ndarray, np.ndarray, list[str]]:
    """Return the label of each row and the predicted one.

    The label of a row is its first reference. A prediction that equals another reference counts as this label.

    Args:
        predictions: one label or text for each row.
        examples: the rows.
        normalize: the function that normalizes answers before they are compared.
        metric: the name of the metric, for errors.

    Returns:
        The numbers of the true labels and of the predicted ones, [N] each, and the text of each number.

    Raises:
        DataError: a prediction is neither a text nor a label.
    """
    number: dict[str, int] = {}
    known: dict[str, str] = {}  # rows have few different texts, and the bootstrap reads them some hundred times

    def normal(text: str) -> str:
        if text not in known:
            known[text] = normalize(text)
        return known[text]

    pairs = []
    for prediction, example in zip(predictions, examples, strict=True):
        own, found = normal(example.answers[0]), normal(answer_text(prediction, example, metric=metric))
        if any(found == normal(other) for other in example.answers[1:]):
            found = own
        pairs.append([number.setdefault(text, len(number)) for text in (own, found)])
    true, predicted = np.array(pairs).T
    return true, predicted, list(number)
