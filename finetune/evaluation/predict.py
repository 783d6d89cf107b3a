"""Predictions of a model on rows, in batches and over processes, and the same rows with grey images."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np
from accelerate.utils import gather_object
from tqdm import tqdm

from finetune.core.example import Image
from finetune.training.memory import any_process

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from accelerate import Accelerator
    from transformers import PreTrainedModel

    from finetune.core.batch import Batch
    from finetune.core.example import Example
    from finetune.core.prediction import Prediction
    from finetune.evaluation.base_predictions import BasePredictions
    from finetune.interfaces import Task

BLANK = Image(np.full((224, 224, 3), 128, np.uint8))  # mid-grey


@dataclass(frozen=True, kw_only=True)
class Predictor:
    """A predictor of rows with one model; with an accelerator, each process predicts its share.

    Attributes:
        model: the model in eval mode, on its device.
        task: the task, which makes the predictions.
        prompt_batch: the function that makes the inputs of rows without their answers.
        batch_size: the number of rows of a batch.
        accelerator: the accelerator of a distributed run; None for one process.
        kept: the stored predictions of the base alone, which are used if they exist; None for an adapted model.
    """

    model: PreTrainedModel
    task: Task
    prompt_batch: Callable[[Sequence[Example]], Batch]
    batch_size: int
    accelerator: Accelerator | None = None
    kept: BasePredictions | None = None

    @property
    def process(self) -> tuple[int, int]:
        """The index of this process, and the number of processes that share the rows."""
        return (self.accelerator.process_index, self.accelerator.num_processes) if self.accelerator else (0, 1)

    def __call__(self, examples: Sequence[Example], *, title: str) -> list[Prediction]:
        """Return one prediction a row, in order.

        Args:
            examples: the rows.
            title: the title of the progress bar.
        """
        model, accelerator = self.model, self.accelerator
        known = self.kept.read(examples) if self.kept else None
        missing = known is None if accelerator is None else any_process(accelerator, known is None)
        if known is not None and not missing:
            return known
        process, processes = self.process
        mine = range(process, len(examples), processes)
        # Rows of similar length in one batch need less padding; the order of predictions is restored below.
        order = sorted(mine, key=lambda i: (len(str(examples[i].prompt)), i))
        found: dict[int, Prediction] = {}
        with tqdm(total=len(order), unit="row", desc=title, disable=process != 0, leave=False, mininterval=1.0) as bar:
            # Every process runs the same number of batches: with a sharded base, each waits for the others' forwards.
            most = math.ceil(len(examples) / processes)
            for start in range(0, most, self.batch_size):
                rows = order[start : start + self.batch_size]
                batch = self.prompt_batch([examples[i] for i in rows or [0]]).to(model.device, model.dtype)
                found.update(zip(rows, self.task.predict(model, batch), strict=bool(rows)))
                bar.update(len(rows))
        if accelerator and processes > 1:
            found = dict(gather_object(list(found.items())))
        predictions = [found[i] for i in range(len(examples))]
        if self.kept and process == 0:
            self.kept.keep(examples, predictions)
        return predictions


def blanked(examples: Sequence[Example]) -> tuple[list[Example], list[int]]:
    """Return the rows with grey images, one for each prompt and question type, and each row's place among them."""
    unique: dict[tuple[str, str, str], int] = {}
    rows: list[Example] = []
    places: list[int] = []
    for example in examples:
        # The task's own columns may be part of its input, so rows that differ in them are different.
        key = (str(example.prompt), example.question_type, str(example.columns))
        if key not in unique:
            unique[key] = len(rows)
            rows.append(replace(example, media=tuple(BLANK if m.type == "image" else m for m in example.media)))
        places.append(unique[key])
    return rows, places
