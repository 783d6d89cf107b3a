"""The values of a task's metrics for predictions: of each row, and of any part of the rows."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from finetune.errors import DataError
from finetune.evaluation.scores import Value
from finetune.interfaces import CorpusMetric, RowMetric
from finetune.metrics.statistics import bootstrap_interval, corpus_interval

if TYPE_CHECKING:
    from collections.abc import Sequence

    from finetune.core.example import Example
    from finetune.core.prediction import Prediction
    from finetune.interfaces import Metric


class Measured:
    """Rows, their predictions, and the values of each metric; each metric measures each row once.

    Args:
        metrics: the metrics of the task.
        examples: the rows.
        predictions: one prediction for each row.

    Raises:
        DataError: a metric returns a value that is not a finite number.
    """

    def __init__(self, metrics: Sequence[Metric], examples: Sequence[Example], predictions: Sequence[Prediction]):
        self.metrics, self.examples, self.predictions = metrics, examples, predictions
        # Name of a metric -> one value a row; None if the metric has no value for the row.
        self.of_rows: dict[str, list[float | None]] = {
            metric.key: [row_value(metric, *pair) for pair in zip(predictions, examples, strict=True)]
            if isinstance(metric, RowMetric)
            else [None] * len(examples)
            for metric in metrics
        }

    def values(
        self, rows: Sequence[int] | None = None, *, interval: bool = False, of_corpus: bool = True
    ) -> dict[str, Value]:
        """Return the value of each metric for some rows, without metrics that have no value for any of them.

        Args:
            rows: the numbers of the rows; all rows if None.
            interval: whether to compute intervals of the values.
            of_corpus: whether to compute intervals of corpus metrics too, which measures the rows some hundred times.

        Raises:
            DataError: a metric returns a value that is not a finite number.
        """
        places = range(len(self.examples)) if rows is None else rows
        found = {
            metric.key: self._value(
                metric, places, interval=interval and (of_corpus or not isinstance(metric, CorpusMetric))
            )
            for metric in self.metrics
        }
        return {name: value for name, value in found.items() if value is not None}

    def _value(self, metric: Metric, rows: Sequence[int], *, interval: bool) -> Value | None:
        of_rows = self.of_rows[metric.key]
        groups = [_image(self.examples[i]) for i in rows]
        found = [value for i in rows if (value := of_rows[i]) is not None]
        number: float | None
        number, count, bounds = None, len(found), None
        if isinstance(metric, CorpusMetric) and rows:
            number, count = self._corpus(metric, rows), count if isinstance(metric, RowMetric) else len(rows)
            if interval and number is not None:
                bounds = corpus_interval(lambda drawn: self._corpus(metric, [rows[i] for i in drawn]), groups)
        elif found:
            number = sum(found) / count
            bounds = bootstrap_interval([of_rows[i] for i in rows], groups) if interval else None
        if number is None:
            return None
        return Value(value=number, interval=bounds, n=count, unit=metric.unit, higher_is_better=metric.higher_is_better)

    def _corpus(self, metric: CorpusMetric, rows: Sequence[int]) -> float | None:
        found = metric.corpus([self.predictions[i] for i in rows], [self.examples[i] for i in rows])
        return None if found is None else _finite(found, metric=metric, where=f"{len(rows)} rows")


def row_value(metric: RowMetric, prediction: Prediction, example: Example) -> float | None:
    """Return the value of a metric for one prediction; None if it has none.

    Raises:
        DataError: the metric returns a value that is not a finite number.
    """
    found = metric.row(prediction, example)
    return None if found is None else _finite(found, metric=metric, where=f"row {example.id}")


def _finite(value: float, *, metric: Metric, where: str) -> float:
    number = float(value)
    if not math.isfinite(number):
        raise DataError(
            f"the metric {metric.key} must return a finite number, got {number} ({where}). Return None for a row "
            "without a value."
        )
    return number


def _image(example: Example) -> str:
    return str(example.meta.get("image", example.images[0] if example.images else example.id))
