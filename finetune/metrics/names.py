"""The names of all numbers of an evaluation, for gates, cards, listings and tables.

::

    test.cider  base.cider                     of the adapter, and of the base alone, on the same rows
    test.majority.cider                        of always giving the most frequent answer
    test.blank_image.cider                     of the same model, given a grey image
    test.linear_probe.cider                    of a linear classifier of the frozen base's image features
    test.caption.cider                         of the rows of one question type: caption
    test.n  test.truncated  test.caption.n     numbers of rows
"""

import math
from collections.abc import Iterator, Mapping
from contextlib import suppress
from typing import Any

TEST, BASE = "test", "base"  # of the adapter on the test rows, and of the base alone on the same rows
COUNTS = ("n", "truncated")
MAJORITY, BLANK_IMAGE = "majority", "blank_image"  # baselines, on the same rows
LINEAR_PROBE = "linear_probe"  # a baseline, on those of these rows that it covers
RESERVED = (*COUNTS, MAJORITY, BLANK_IMAGE, LINEAR_PROBE)  # no metric has such a name


def named_values(metrics: Any) -> dict[str, float]:
    """Return every finite number of ``metrics`` by its name.

    Args:
        metrics: the metrics of a manifest, ``test`` and ``base`` -> the JSON of ``Scores``; or those of a summary, from
            ``summarized``. Other forms yield no numbers.
    """
    named: dict[str, float] = {}
    for who, scores in _items(metrics):
        for name, value in [*_whole(scores), *_by_question_type(scores)]:
            if not isinstance(value, bool):
                with suppress(OverflowError):
                    if math.isfinite(value):
                        # The name of a question type may equal that of a baseline, which comes first.
                        named.setdefault(f"{who}.{name}", float(value))
    return named


def summarized(metrics: Any) -> dict[str, dict[str, float]]:
    """Return the numbers over all rows in a manifest's ``metrics``, for a registry's log."""
    return {who: dict(_whole(scores)) for who, scores in _items(metrics)}


def _whole(scores: Any) -> Iterator[tuple[str, float]]:
    yield from _measured(scores.get("values") if isinstance(scores, Mapping) else None)
    for key, value in _items(scores):
        if key == "baselines":
            for baseline, values in _items(value):
                yield from ((f"{baseline}.{name}", number) for name, number in _measured(values))
        elif isinstance(value, int | float):
            yield key, value


def _by_question_type(scores: Any) -> Iterator[tuple[str, float]]:
    for name, part in _items(scores.get("by_question_type") if isinstance(scores, Mapping) else None):
        yield from ((f"{name}.{metric}", number) for metric, number in _whole(part))


def _measured(values: Any) -> Iterator[tuple[str, float]]:
    for name, value in _items(values):
        if isinstance(value, Mapping) and isinstance(number := value.get("value"), int | float):
            yield name, number


def _items(value: Any) -> Iterator[tuple[str, Any]]:
    if isinstance(value, Mapping):
        yield from value.items()
