"""The metrics of a task, built from the table of metrics."""

from __future__ import annotations

from typing import TYPE_CHECKING

from finetune.errors import PluginError
from finetune.metrics.names import RESERVED
from finetune.plugins import find

if TYPE_CHECKING:
    from finetune.interfaces import Metric, Task


def metrics_of(task: Task) -> tuple[Metric, ...]:
    """Return the metrics of a task: those in its options, else its own."""
    return tuple(_metric(name, task) for name in task.options.metrics or task.metrics)


def _metric(name: str, task: Task) -> Metric:
    metric: Metric = find("metrics", name, what="metric")(task.options)
    missing = [part for part in ("key", "unit", "higher_is_better") if not hasattr(metric, part)]
    if not hasattr(metric, "row") and not hasattr(metric, "corpus"):
        missing.append("row or corpus")
    if missing:
        raise PluginError(f"the metric {name} must have {missing[0]}, but {type(metric).__name__} has none")
    if metric.key != name or name in RESERVED or "." in name:
        raise PluginError(
            f"the key of the metric {name} must be its name, without a dot and not one of {', '.join(RESERVED)}; got "
            f"{metric.key!r}"
        )
    return metric
