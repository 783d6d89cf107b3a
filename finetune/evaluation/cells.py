"""The cells of a table of evaluations: each metric with its interval and baselines."""

from __future__ import annotations

from typing import TYPE_CHECKING

from finetune.metrics.names import BLANK_IMAGE, LINEAR_PROBE, MAJORITY

if TYPE_CHECKING:
    from collections.abc import Sequence

    from finetune.evaluation.evaluate import Evaluation
    from finetune.evaluation.scores import Scores


def cells(evaluations: Sequence[Evaluation]) -> tuple[tuple[str, ...], list[tuple[str, ...]]]:
    """Return the headings of the columns, and one line for each evaluation."""
    metrics = dict.fromkeys(name for one in evaluations for name in one.scores.values)
    baselines = [MAJORITY, BLANK_IMAGE]
    if any(LINEAR_PROBE in one.scores.baselines for one in evaluations):  # a run alone has one
        baselines.append(LINEAR_PROBE)
    head = ["adapter", "config"]
    for name in metrics:
        head += [words(name), "95 % interval", *map(words, baselines)]
    lines = [
        (
            one.adapter,
            one.config,
            *(cell for name in metrics for cell in _of_metric(name, one.scores, baselines)),
            str(one.scores.n),
        )
        for one in evaluations
    ]
    return (*head, "rows"), lines


def words(name: str) -> str:
    """Return the name of a metric or a baseline in words, for people."""
    return name.replace("_", " ")


def _of_metric(name: str, scores: Scores, baselines: Sequence[str]) -> tuple[str, ...]:
    value = scores.values.get(name)
    if value is None:
        return ("-",) * (2 + len(baselines))
    interval = f"{value.interval[0]:.3f} to {value.interval[1]:.3f}" if value.interval else "-"
    return (str(value), interval, *(scores.beside(of, name) or "-" for of in baselines))
