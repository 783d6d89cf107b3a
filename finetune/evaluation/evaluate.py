"""Evaluation of a model on rows: one prediction for each row, and scores beside their baselines."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from finetune.core.prediction import Text
from finetune.evaluation.baselines import majority, predict_blank
from finetune.evaluation.measured import Measured
from finetune.evaluation.rows import Row, make_rows
from finetune.evaluation.scores import Scores
from finetune.metrics.building import metrics_of
from finetune.metrics.names import BLANK_IMAGE, LINEAR_PROBE, MAJORITY

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from finetune.core.example import Example
    from finetune.core.prediction import Prediction
    from finetune.evaluation.predict import Predictor
    from finetune.evaluation.scores import Value
    from finetune.interfaces import Metric, Task


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """The evaluation of one model on the rows of one recipe.

    Attributes:
        adapter: the model: a reference, a folder, ``adapter`` for that of a run, or ``base`` for the base alone.
        config: the name of the recipe whose rows these are.
        scores: the scores of all rows.
        rows: each row with its prediction and the values of the metrics.
        probe: the verdict on the adapter's effect on this base, and the effect's distance from the recorded one,
            relative to the recorded one; None if it was not measured.
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
        """Return plain data, without the rows."""
        return {"adapter": self.adapter, "config": self.config, "scores": self.scores.to_json(), "probe": self.probe}


def evaluate_rows(
    predictor: Predictor,
    examples: Sequence[Example],
    *,
    title: str = "evaluating",
    probe: Sequence[Prediction | None] | None = None,
) -> tuple[Scores, tuple[Row, ...]]:
    """Predict every row, and every prompt once more with a grey image.

    Args:
        predictor: the predictor of the rows.
        examples: the rows.
        title: the title of the progress bar.
        probe: the predictions of a linear probe, as ``score`` has them.

    Returns:
        The scores, and each row with its prediction.
    """
    predictions = predictor(examples, title=title)
    blank = predict_blank(predictor, examples, title=title)
    task = predictor.task
    measured = Measured(metrics_of(task), examples, predictions)
    return score(task, measured, blank_predictions=blank, probe=probe), make_rows(task, measured)


def score(
    task: Task,
    measured: Measured,
    *,
    blank_predictions: Sequence[Prediction] | None = None,
    probe: Sequence[Prediction | None] | None = None,
) -> Scores:
    """Return the scores of measured rows, and of the baselines on the same rows.

    Args:
        task: the task, which finds the constant predictions.
        measured: the rows with their predictions.
        blank_predictions: one prediction for each row with grey images; None for no such baseline.
        probe: one prediction of a linear probe for each row, None for a row that it does not cover; None for no such
            baseline.
    """
    metrics, examples = measured.metrics, measured.examples
    constants, measured_on = majority(task, examples)
    baselines: dict[str, Callable[[Sequence[int]], dict[str, Value]]] = {
        MAJORITY: Measured(metrics, measured_on, constants).values
    }
    if blank_predictions is not None:
        baselines[BLANK_IMAGE] = Measured(metrics, examples, blank_predictions).values
    if probe is not None:
        baselines[LINEAR_PROBE] = _values_of_some(metrics, examples, probe)
    rows_of: dict[str, list[int]] = defaultdict(list)
    for i, example in enumerate(examples):
        rows_of[example.question_type].append(i)

    def part(rows: Sequence[int], by_question_type: dict[str, Scores], *, whole: bool) -> Scores:
        return Scores(
            values=measured.values(rows, interval=True, of_corpus=whole),
            baselines={name: values(rows) for name, values in baselines.items()},
            by_question_type=by_question_type,
            n=len(rows),
            truncated=sum(_is_truncated(measured.predictions[i]) for i in rows),
        )

    # An interval of a corpus metric measures the rows some hundred times, so question types get none.
    parts = {question_type: part(rows, {}, whole=False) for question_type, rows in sorted(rows_of.items())}
    return part(range(len(examples)), parts, whole=True)


def _values_of_some(
    metrics: Sequence[Metric], examples: Sequence[Example], predictions: Sequence[Prediction | None]
) -> Callable[[Sequence[int]], dict[str, Value]]:
    """Return the function that returns the values for some rows, from those of them that have a prediction."""
    found = {i: one for i, one in enumerate(predictions) if one is not None}
    place = {i: number for number, i in enumerate(found)}
    measured = Measured(metrics, [examples[i] for i in found], list(found.values()))
    return lambda rows: measured.values([place[i] for i in rows if i in place])


def _is_truncated(prediction: Prediction) -> bool:
    return isinstance(prediction, Text) and prediction.finish_reason == "length"
