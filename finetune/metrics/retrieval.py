"""Retrieval: whether what lies closest is what belongs together."""

from collections.abc import Sequence

import numpy as np


def recall_at_1(similarity: np.ndarray, rows: Sequence[str], columns: Sequence[str]) -> float:
    """Return the share of rows whose closest column is their own.

    Args:
        similarity: [rows, columns], larger is closer.
        rows: what each row is; an image's caption, or a text.
        columns: what each column is, in the same words.
    """
    closest = similarity.argmax(axis=1)
    return float(np.mean([wanted == columns[i] for wanted, i in zip(rows, closest, strict=True)]))
