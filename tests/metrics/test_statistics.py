"""Intervals against values worked out by hand."""

import numpy as np
import pytest

from finetune.metrics.statistics import bootstrap_interval, corpus_interval


def test_shares_have_the_interval_that_release_0_1_gave_them():
    """Computed then, with whole numbers of right rows in place of values."""
    right = [True, False, True, True, False, True, True, False]
    assert bootstrap_interval(right, list("aabbccdd")) == (0.5, 0.875)
    assert bootstrap_interval([float(one) for one in right], list("aabbccdd")) == (0.5, 0.875)


def test_a_row_without_a_value_is_left_out():
    values, groups = [1.0, None, 0.5, None, 0.25], list("abcbd")
    assert bootstrap_interval(values, groups) == bootstrap_interval([1.0, 0.5, 0.25], list("acd"))
    assert bootstrap_interval([None], ["a"]) == (0.0, 0.0)


def test_a_value_of_all_rows_is_measured_anew_on_each_draw():
    values = np.arange(60) % 7.0
    groups = [str(i // 3) for i in range(60)]
    found = corpus_interval(lambda rows: float(values[rows].mean()), groups, draws=2000)
    assert found == bootstrap_interval([float(v) for v in values], groups), "of a mean both are the same"
    drawn = []
    corpus_interval(lambda rows: drawn.append(sorted(rows)) or 0.0, ["a", "a", "b"], draws=50)
    assert {tuple(rows) for rows in drawn} == {(0, 1, 2), (0, 0, 1, 1), (2, 2)}, "a group is drawn as a whole"


def test_interval_against_the_binomial():
    low, high = bootstrap_interval([True] * 80 + [False] * 20, [str(i) for i in range(100)])
    assert low == pytest.approx(0.8 - 1.96 * 0.04, abs=0.015)
    assert high == pytest.approx(0.8 + 1.96 * 0.04, abs=0.015)


def test_rows_of_one_image_are_drawn_as_a_group():
    right = ([True] * 4 + [False] * 4) * 10
    single = bootstrap_interval(right, [str(i) for i in range(80)])
    grouped = bootstrap_interval(right, [str(i // 4) for i in range(80)])
    assert grouped[1] - grouped[0] > 1.7 * (single[1] - single[0])


def test_all_right_and_nothing():
    assert bootstrap_interval([True] * 5, list("abcde")) == (1.0, 1.0)
    assert bootstrap_interval([], []) == (0.0, 0.0)
