"""Scores, as pure functions of predictions and references."""

from collections import Counter, defaultdict
from collections.abc import Sequence

import numpy as np


def recall_at_1(similarity: np.ndarray, rows: Sequence[str], columns: Sequence[str]) -> float:
    """Returns the share of rows whose closest column is their own, as retrieval is judged.

    Args:
        similarity: [rows, columns], larger is closer.
        rows: what each row is; a picture's caption, or a text.
        columns: what each column is, in the same words.
    """
    closest = similarity.argmax(axis=1)
    return float(np.mean([wanted == columns[i] for wanted, i in zip(rows, closest, strict=True)]))


def bootstrap_interval(
    correct: Sequence[bool], groups: Sequence[str], *, seed: int = 0, draws: int = 2000
) -> tuple[float, float]:
    """Returns the 95 % interval of the mean by drawing whole groups with replacement.

    Args:
        correct: one entry a row.
        groups: rows of one group (the questions about one picture) are not independent and are drawn together.
        seed: of the draws.
        draws: how many.
    """
    if not correct:
        return (0.0, 0.0)
    sums: dict[str, list[int]] = defaultdict(lambda: [0, 0])
    for right, group in zip(correct, groups, strict=True):
        sums[group][0] += right
        sums[group][1] += 1
    table = np.array(list(sums.values()))  # [groups, 2]: right, all
    rng = np.random.default_rng(seed)
    picked = rng.multinomial(len(table), np.full(len(table), 1 / len(table)), size=draws)  # [draws, groups]
    right, all_ = (picked @ table).T
    low, high = np.quantile(right / all_, [0.025, 0.975])
    return float(low), float(high)


def majority_score(answers: Sequence[str], kinds: Sequence[str]) -> float:
    """Returns the score of always giving the answer most frequent among these rows for its question type."""
    by_kind: dict[str, Counter[str]] = defaultdict(Counter)
    for answer, kind in zip(answers, kinds, strict=True):
        by_kind[kind][answer] += 1
    return sum(counts.most_common(1)[0][1] for counts in by_kind.values()) / max(1, len(answers))
