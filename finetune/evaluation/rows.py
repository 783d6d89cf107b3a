"""Single rows of an evaluation: question, prediction, references and values, as JSON lines."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from finetune.core.example import ImageHandle, text_of
from finetune.evaluation.measured import row_value
from finetune.interfaces import RowMetric

if TYPE_CHECKING:
    from finetune.core.example import Example
    from finetune.core.prediction import Prediction
    from finetune.evaluation.measured import Measured
    from finetune.interfaces import Task


@dataclass(frozen=True, kw_only=True)
class Row:
    """One row of an evaluation.

    Attributes:
        example: the row itself.
        prediction: the prediction of the model.
        values: each name of a metric -> the row's value; None if it has none.
        right: whether the prediction scores at least as high as the row's own reference, by the first metric; None if
            that metric has no value for single rows.
    """

    example: Example
    prediction: Prediction
    values: dict[str, float | None]
    right: bool | None

    def to_json(self) -> dict[str, Any]:
        """Return plain data: one line of a file of predictions."""
        return {
            "id": self.example.id,
            "question_type": self.example.question_type,
            "question": question_of(self.example),
            "images": _names(self.example),
            "prediction": self.prediction.to_json(),
            "references": self.example.answers,
            "values": self.values,
            "right": self.right,
        }


def make_rows(task: Task, measured: Measured) -> tuple[Row, ...]:
    """Return each row with its prediction and the values of the metrics.

    Args:
        task: the task, which gives the row's reference as a prediction.
        measured: the rows.
    """
    first = measured.metrics[0]
    rows = []
    for i, (example, prediction) in enumerate(zip(measured.examples, measured.predictions, strict=True)):
        values = {name: of_rows[i] for name, of_rows in measured.of_rows.items()}
        right = None
        if isinstance(first, RowMetric) and (value := values[first.key]) is not None:
            own = row_value(first, task.constant([example]), example)
            right = own is not None and (value >= own if first.higher_is_better else value <= own)
        rows.append(Row(example=example, prediction=prediction, values=values, right=right))
    return tuple(rows)


def question_of(example: Example) -> str:
    """Return the question of a row, else the text of its last turn before the answer, else its id."""
    if "question" in example.meta:
        return str(example.meta["question"])
    return (text_of(example.prompt[-1]) if example.prompt else "") or example.id


def _names(example: Example) -> list[str] | None:
    """Return the names of a row's images; None if one of them is in memory and has no name."""
    named = [str(source) for source in example.images if isinstance(source, Path | ImageHandle)]
    return named if len(named) == len(example.images) else None
