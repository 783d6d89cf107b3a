"""Scores against values worked out by hand."""

import numpy as np
import pytest

from finetune.tasks.metrics import bootstrap_interval, majority_score, recall_at_1


def test_majority_is_within_each_kind():
    answers = ["a", "a", "b", "yes", "no", "no"]
    assert majority_score(answers, ["x", "x", "x", "y", "y", "y"]) == pytest.approx(4 / 6)
    assert majority_score(answers, ["x"] * 6) == pytest.approx(2 / 6)


def test_recall_counts_rows_whose_closest_column_is_their_own():
    similarity = np.array([[0.9, 0.1, 0.0], [0.8, 0.7, 0.0], [0.1, 0.2, 0.3], [0.4, 0.6, 0.5]])
    assert recall_at_1(similarity, ["a", "b", "c", "c"], ["a", "b", "c"]) == 0.5
    assert recall_at_1(similarity.T, ["a", "b", "c"], ["a", "b", "c", "c"]) == 1.0
    assert recall_at_1(similarity.T, ["a", "b", "c"], ["a", "a", "b", "c"]) == pytest.approx(2 / 3)


def test_interval_against_the_binomial():
    low, high = bootstrap_interval([True] * 80 + [False] * 20, [str(i) for i in range(100)])
    assert low == pytest.approx(0.8 - 1.96 * 0.04, abs=0.015)
    assert high == pytest.approx(0.8 + 1.96 * 0.04, abs=0.015)


def test_rows_of_one_picture_are_drawn_together():
    right = ([True] * 4 + [False] * 4) * 10
    apart = bootstrap_interval(right, [str(i) for i in range(80)])
    together = bootstrap_interval(right, [str(i // 4) for i in range(80)])
    assert together[1] - together[0] > 1.7 * (apart[1] - apart[0])


def test_all_right_and_nothing():
    assert bootstrap_interval([True] * 5, list("abcde")) == (1.0, 1.0)
    assert bootstrap_interval([], []) == (0.0, 0.0)
