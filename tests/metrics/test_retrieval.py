"""Retrieval against values worked out by hand."""

import numpy as np
import pytest

from finetune.metrics.retrieval import recall_at_1


def test_recall_counts_rows_whose_closest_column_is_their_own():
    similarity = np.array([[0.9, 0.1, 0.0], [0.8, 0.7, 0.0], [0.1, 0.2, 0.3], [0.4, 0.6, 0.5]])
    assert recall_at_1(similarity, ["a", "b", "c", "c"], ["a", "b", "c"]) == 0.5
    assert recall_at_1(similarity.T, ["a", "b", "c"], ["a", "b", "c", "c"]) == 1.0
    assert recall_at_1(similarity.T, ["a", "b", "c"], ["a", "a", "b", "c"]) == pytest.approx(2 / 3)
