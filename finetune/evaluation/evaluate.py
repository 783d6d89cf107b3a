"""Evaluation of a model on rows: one prediction a row, all of them kept, and scores beside what they must beat."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from finetune.evaluation.baselines import BLANK_IMAGE, MAJORITY, majority, predict_blank
from finetune.evaluation.predict import predict
from finetune.evaluation.rows import Row, finite, make_rows, row_value
from finetune.evaluation.scores import Scores, Value
from finetune.interfaces import CorpusMetric, RowMetric
from finetune.metrics.building import metrics_of
from finetune.metrics.statistics import bootstrap_interval, corpus_interval
from finetune.prediction import Text

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from accelerate import Accelerator
    from transformers import PreTrainedModel

    from finetune.batch import Batch
    from finetune.evaluation.base_predictions import BasePredictions
    from finetune.example import Example
    from finetune.interfaces import Metric, Task
    from finetune.prediction import Prediction


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """One model on the rows of one config.

    Attributes:
        adapter: a reference, a folder, ``adapter`` for that of a run, or ``base`` for the base alone.
        config: name of the recipe whose rows these are.
        scores: of all rows.
        rows: each row with its prediction and what that is worth.
        probe: the verdict on the adapter's effect on this base, and how far it is from the recorded one, relative to
            it; None where it was not measured.
    """

    adapter: str
    config: str
    scores: Scores
    rows: tuple[Row, ...]
    probe: dict[str, Any] | None = None

    @property
    def predictions(self) -> list[Prediction]:
        """One prediction a row."""
        return [row.prediction for row in self.rows]

    def to_json(self) -> dict[str, Any]:
        """Return plain data: all but the rows."""
        return {"adapter": self.adapter, "config": self.config, "scores": self.scores.to_json(), "probe": self.probe}


def evaluate(
    model: PreTrainedModel,
    task: Task,
    examples: Sequence[Example],
    prompt_batch: Callable[[Sequence[Example]], Batch],
    *,
    batch_size: int,
    accelerator: Accelerator | None = None,
    title: str = "evaluating",
    kept: BasePredictions | None = None,
) -> tuple[Scores, tuple[Row, ...]]:
    """Predict every row, and every prompt once more with a grey image; arguments as ``predict``.

    Returns:
        The scores, and each row with its prediction.
    """
    common: dict[str, Any] = {"batch_size": batch_size, "accelerator": accelerator, "title": title, "kept": kept}
    predictions = predict(model, task, examples, prompt_batch, **common)
    blank = predict_blank(model, task, examples, prompt_batch, **common)
    return score(task, examples, predictions, blank_predictions=blank), make_rows(task, examples, predictions)


def score(
    task: Task,
    examples: Sequence[Example],
    predictions: Sequence[Prediction],
    *,
    blank_predictions: Sequence[Prediction] | None = None,
) -> Scores:
    """Return the scores of ``predictions``, one a row, and of the baselines."""
    metrics = metrics_of(task)
    measured = [_Measured(metric, predictions, examples) for metric in metrics]
    constants, measured_on = majority(task, examples)
    baselines = {MAJORITY: [_Measured(metric, constants, measured_on) for metric in metrics]}
    if blank_predictions is not None:
        baselines[BLANK_IMAGE] = [_Measured(metric, blank_predictions, examples) for metric in metrics]
    rows_of: dict[str, list[int]] = defaultdict(list)
    for i, example in enumerate(examples):
        rows_of[example.kind].append(i)

    def part(rows: Sequence[int], by_kind: dict[str, Scores], *, whole: bool) -> Scores:
        return Scores(
            values=_values(measured, rows, interval=True, of_corpus=whole),
            baselines={name: _values(found, rows, interval=False) for name, found in baselines.items()},
            by_kind=by_kind,
            n=len(rows),
            truncated=sum(_is_truncated(predictions[i]) for i in rows),
        )

    # An interval of a corpus metric measures the rows some hundred times, so single question types have none.
    kinds = {kind: part(rows, {}, whole=False) for kind, rows in sorted(rows_of.items())}
    return part(range(len(examples)), kinds, whole=True)


def values_of(task: Task, examples: Sequence[Example], predictions: Sequence[Prediction]) -> dict[str, Value]:
    """Return what each metric of the task measures on these rows, without intervals and baselines."""
    measured = [_Measured(metric, predictions, examples) for metric in metrics_of(task)]
    return _values(measured, range(len(examples)), interval=False)


class _Measured:
    """One metric on all rows; each row is measured once, whatever parts of them are asked for.

    Args:
        metric: the metric.
        predictions: one a row.
        examples: the rows.
    """

    def __init__(self, metric: Metric, predictions: Sequence[Prediction], examples: Sequence[Example]):
        self.metric, self._predictions, self._examples = metric, predictions, examples
        self._values: list[float | None] = [None] * len(examples)
        if isinstance(metric, RowMetric):
            self._values = [row_value(metric, p, e) for p, e in zip(predictions, examples, strict=True)]

    def value(self, rows: Sequence[int], *, interval: bool) -> Value | None:
        """Return the value of some rows; None where none of them has one.

        Raises:
            DataError: the metric gives a value that is no finite number.
        """
        metric, groups = self.metric, [_image(self._examples[i]) for i in rows]
        found = [value for i in rows if (value := self._values[i]) is not None]
        number, count, bounds = 0.0, len(found), None
        if isinstance(metric, CorpusMetric) and rows:
            number, count = self._corpus(rows), count if isinstance(metric, RowMetric) else len(rows)
            if interval:
                bounds = corpus_interval(lambda drawn: self._corpus([rows[i] for i in drawn]), groups)
        elif found:
            number = sum(found) / count
            bounds = bootstrap_interval([self._values[i] for i in rows], groups) if interval else None
        else:
            return None
        return Value(value=number, interval=bounds, n=count, unit=metric.unit, higher_is_better=metric.higher_is_better)

    def _corpus(self, rows: Sequence[int]) -> float:
        assert isinstance(self.metric, CorpusMetric)
        found = self.metric.corpus([self._predictions[i] for i in rows], [self._examples[i] for i in rows])
        return finite(found, metric=self.metric, where=f"{len(rows)} rows")


def _values(
    measured: Sequence[_Measured], rows: Sequence[int], *, interval: bool, of_corpus: bool = True
) -> dict[str, Value]:
    found = {
        each.metric.key: each.value(
            rows, interval=interval and (of_corpus or not isinstance(each.metric, CorpusMetric))
        )
        for each in measured
    }
    return {name: value for name, value in found.items() if value is not None}


def _is_truncated(prediction: Prediction) -> bool:
    return isinstance(prediction, Text) and prediction.finish_reason == "length"


def _image(example: Example) -> str:
    return str(example.meta.get("picture", example.images[0] if example.images else example.id))
