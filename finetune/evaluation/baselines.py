"""Predict what a model must beat: one constant prediction for all rows, and its own predictions without the image."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import replace
from typing import TYPE_CHECKING

from finetune.evaluation.predict import blanked, predict

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from accelerate import Accelerator
    from transformers import PreTrainedModel

    from finetune.batch import Batch
    from finetune.evaluation.base_predictions import BasePredictions
    from finetune.example import Example
    from finetune.interfaces import Task
    from finetune.prediction import Prediction

MAJORITY, BLANK_IMAGE = "majority", "blank_image"


def majority(task: Task, examples: Sequence[Example]) -> tuple[list[Prediction], list[Example]]:
    """Return the task's constant prediction of each row's question type, and the rows that it is measured on.

    The constant is found on these very rows, so it is the best that a model could say that ignores them. Of a row
    with several references the first one counts alone: the constant was chosen by these.
    """
    rows_of: dict[str, list[Example]] = defaultdict(list)
    for example in examples:
        rows_of[example.kind].append(example)
    constants = {kind: task.constant(rows) for kind, rows in rows_of.items()}
    return [constants[e.kind] for e in examples], [replace(e, answers=e.answers[:1]) for e in examples]


def predict_blank(
    model: PreTrainedModel,
    task: Task,
    examples: Sequence[Example],
    prompt_batch: Callable[[Sequence[Example]], Batch],
    *,
    batch_size: int,
    accelerator: Accelerator | None = None,
    title: str = "evaluating",
    kept: BasePredictions | None = None,
) -> list[Prediction]:
    """Return what the model predicts for each row when all images are grey; arguments as ``predict``."""
    rows, places = blanked(examples)
    title = f"{title}, with blank images"
    found = predict(
        model, task, rows, prompt_batch, batch_size=batch_size, accelerator=accelerator, title=title, kept=kept
    )
    return [found[place] for place in places]
