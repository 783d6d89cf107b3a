"""Baselines that a model must beat: one constant prediction for all rows, and its own predictions without the image."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import replace
from typing import TYPE_CHECKING

from finetune.evaluation.predict import blanked

if TYPE_CHECKING:
    from collections.abc import Sequence

    from finetune.core.example import Example
    from finetune.core.prediction import Prediction
    from finetune.evaluation.predict import Predictor
    from finetune.interfaces import Task


def majority(task: Task, examples: Sequence[Example]) -> tuple[list[Prediction], list[Example]]:
    """Return the task's constant prediction for each row's question type, and the rows that it is measured on.

    The constant is chosen on these very rows, so it is the best score of a model that ignores the images. Only the
    first of several answers counts, because the constant was chosen by first answers. Captions of one image are equal
    references, so all of them count, as for the model.
    """
    rows_of: dict[str, list[Example]] = defaultdict(list)
    for example in examples:
        rows_of[example.question_type].append(example)
    constants = {question_type: task.constant(rows) for question_type, rows in rows_of.items()}
    measured_on = [e if e.captions else replace(e, answers=e.answers[:1]) for e in examples]
    return [constants[e.question_type] for e in examples], measured_on


def predict_blank(predictor: Predictor, examples: Sequence[Example], *, title: str) -> list[Prediction]:
    """Return the prediction of each row when all images are grey; arguments as ``Predictor.__call__``."""
    rows, places = blanked(examples)
    found = predictor(rows, title=f"{title}, with blank images")
    return [found[place] for place in places]
