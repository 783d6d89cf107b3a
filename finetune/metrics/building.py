"""The metrics of a task, built from the table of metrics."""

from __future__ import annotations

from typing import TYPE_CHECKING

from finetune.plugins import find

if TYPE_CHECKING:
    from finetune.interfaces import Metric, Task


def metrics_of(task: Task) -> tuple[Metric, ...]:
    """Return the metrics that a task is evaluated by: those that its options name, else its own."""
    names = task.options.metrics or task.metrics
    return tuple(find("metrics", name, what="metric")(task.options) for name in names)
