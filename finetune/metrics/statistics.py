"""Intervals of metrics, by the bootstrap over groups of rows."""

from collections import defaultdict
from collections.abc import Callable, Sequence

import numpy as np

_BOUNDS = (0.025, 0.975)  # of a 95 % interval


def bootstrap_interval(
    values: Sequence[float | None], groups: Sequence[str], *, seed: int = 0, draws: int = 2000
) -> tuple[float, float]:
    """Return the 95 % interval of the mean, from draws of whole groups with replacement.

    Args:
        values: one value for each row; a row without a value is left out.
        groups: the group of each row, such as its image; each draw takes whole groups.
        seed: the seed of the draws.
        draws: the number of draws.
    """
    sums: dict[str, list[float]] = defaultdict(lambda: [0, 0])
    for value, group in zip(values, groups, strict=True):
        if value is not None:
            sums[group][0] += value
            sums[group][1] += 1
    if not sums:
        return (0.0, 0.0)
    table = np.array(list(sums.values()))  # [groups, 2]: sum of values, number of rows
    total, count = (_draw(len(table), seed, draws) @ table).T
    low, high = np.quantile(total / count, _BOUNDS)
    return float(low), float(high)


def corpus_interval(
    measure: Callable[[list[int]], float | None], groups: Sequence[str], *, seed: int = 0, draws: int = 200
) -> tuple[float, float] | None:
    """Return the 95 % interval of a value that is not a mean over rows, measured on each draw.

    Draws without a value are left out; the result is None if no draw has one.

    Args:
        measure: the function that returns the value of some rows, or None; a row that is drawn twice appears twice.
        groups: the group of each row, as for ``bootstrap_interval``.
        seed: the seed of the draws.
        draws: the number of draws; fewer than for a mean, since each one measures all rows.
    """
    rows_of: dict[str, list[int]] = defaultdict(list)
    for row, group in enumerate(groups):
        rows_of[group].append(row)
    if not rows_of:
        return (0.0, 0.0)
    found: list[float] = []
    for times in _draw(len(rows_of), seed, draws).tolist():
        value = measure([row for rows, n in zip(rows_of.values(), times, strict=True) for row in rows * n])
        if value is not None:
            found.append(value)
    if not found:
        return None
    low, high = np.quantile(found, _BOUNDS)
    return float(low), float(high)


def _draw(groups: int, seed: int, draws: int) -> np.ndarray:
    """Return how often each draw contains each group, [draws, groups]."""
    rng = np.random.default_rng(seed)
    return rng.multinomial(groups, np.full(groups, 1 / groups), size=draws)
