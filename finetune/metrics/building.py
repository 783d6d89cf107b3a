"""The metrics of a task, built from the table of metrics."""

from __future__ import annotations

from typing import TYPE_CHECKING

from finetune.errors import PluginError, RecipeError
from finetune.metrics.names import RESERVED
from finetune.plugins import find

if TYPE_CHECKING:
    from finetune.interfaces import Metric, Task
    from finetune.recipe import TaskSection


def metrics_of(task: Task) -> tuple[Metric, ...]:
    """Return the metrics of a task: those in its options, else its own."""
    return tuple(_metric(name, task) for name in task.options.metrics or task.metrics)


def check_best_value(options: TaskSection) -> None:
    """Check that the metric that chooses the best weights states the best value that a row can have.

    Args:
        options: the section of the task.

    Raises:
        RecipeError: it states none, or its value is not a mean over rows.
    """
    name = (options.metrics or find("tasks", options.name, what="task").metrics)[0]
    metric = find("metrics", name, what="metric")
    if getattr(metric, "best_value", None) is None or hasattr(metric, "corpus"):
        raise RecipeError(
            f"train.end_decided_validations: the first metric must state a best_value of its rows, but {name} states "
            "none. Set it to false, or name another metric first in task.metrics."
        )


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
