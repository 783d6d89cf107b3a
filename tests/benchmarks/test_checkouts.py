"""What ten pairs of two checkouts say, and when they say nothing."""

import pytest

from benchmarks.checkouts import interval, verdict


def test_the_median_of_equal_ratios_is_certain():
    assert interval([1.02] * 10) == pytest.approx((1.02, 1.02))


def test_the_interval_holds_the_median_and_is_the_same_every_time():
    ratios = [0.9, 0.95, 0.97, 0.99, 1.0, 1.01, 1.02, 1.04, 1.08, 1.3]
    low, high = interval(ratios)
    assert 0.95 <= low < 1.005 < high <= 1.06
    assert interval(ratios) == (low, high)


@pytest.mark.parametrize(
    ("low", "high", "expected"), [(0.98, 1.049, "held"), (1.0, 1.06, "inconclusive"), (1.06, 1.1, "MISSED")]
)
def test_a_bound_inside_of_the_interval_is_neither_held_nor_missed(low, high, expected):
    assert verdict(low, high) == expected
