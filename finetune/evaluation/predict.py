"""Predictions of a model on rows, in batches and over processes, and the same rows with grey images."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary

import numpy as np
from accelerate.utils import DistributedType, gather_object
from torch.distributed.tensor import DTensor
from tqdm import tqdm

from finetune.core.example import Image
from finetune.interfaces import RowsTask
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

_LOGGED: WeakKeyDictionary[Any, set[str]] = WeakKeyDictionary()  # lines that a model's user has seen
BLANK = Image(np.full((224, 224, 3), 128, np.uint8))  # mid-grey


@dataclass(frozen=True, kw_only=True)
class Predictor:
    """A predictor of rows with one model; with an accelerator, each process predicts its share.

    Attributes:
        model: the model in eval mode, on its device.
        task: the task, which makes the predictions.
        prompt_batch: the function that makes the inputs of rows without their answers.
        batch_size: the number of rows of a batch.
        prompt_parts: the function that returns the ids of a prompt up to its last image, and those after it; None if
            rows about the same images share nothing.
        accelerator: the accelerator of a distributed run; None for one process.
        kept: the stored predictions of the base alone, which are used if they exist; None for an adapted model.
        log: the function that gets a line for the user where rows need fixed batches; None for no lines.
    """

    model: PreTrainedModel
    task: Task
    prompt_batch: Callable[[Sequence[Example]], Batch]
    batch_size: int
    prompt_parts: Callable[[Example], tuple[list[int], list[int]] | None] | None = None
    accelerator: Accelerator | None = None
    kept: BasePredictions | None = None
    log: Callable[[str], None] | None = None

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
        accelerator = self.accelerator
        known = self.kept.read(examples) if self.kept else None
        missing = known is None if accelerator is None else any_process(accelerator, known is None)
        if known is not None and not missing:
            return known
        found = self._found(examples, title)
        if accelerator and accelerator.num_processes > 1:
            found = dict(gather_object(list(found.items())))
        predictions = [found[i] for i in range(len(examples))]
        if self.kept and self.process[0] == 0:
            self.kept.keep(examples, predictions)
        return predictions

    def why_fixed_batches(self) -> str | None:
        """Return why rows that end wait for the others of their batch, for the user; None if nothing is known."""
        if not isinstance(self.task, RowsTask):
            return f"{type(self.task).__name__} predicts batches only"
        if self._is_sharded():
            return "the base is sharded, so each process waits for the forwards of the others"
        return self.task.why_fixed_batches(self.model)

    def _is_sharded(self) -> bool:
        """Return whether a process needs the others for a forward."""
        if self.accelerator is None or self.accelerator.num_processes == 1:
            return False
        kinds = (DistributedType.FSDP, DistributedType.DEEPSPEED)
        return self.accelerator.distributed_type in kinds or any(
            isinstance(parameter, DTensor) for parameter in self.model.parameters()
        )

    def _found(self, examples: Sequence[Example], title: str) -> dict[int, Prediction]:
        """Return the predictions of the rows of this process, by their numbers."""
        process, processes = self.process
        task, why = self.task, self.why_fixed_batches()
        found: dict[int, Prediction] = {}
        with tqdm(
            total=math.ceil(len(examples) / processes),
            unit="row",
            desc=title,
            disable=process != 0,
            leave=False,
            mininterval=1.0,
        ) as bar:

            def take(row: int, prediction: Prediction) -> None:
                found[row] = prediction
                bar.update()

            if why is None and isinstance(task, RowsTask):
                why = task.predict_rows(
                    self.model,
                    self,
                    examples,
                    order=_by_length(range(len(examples)), examples),
                    share=self.process,
                    batch_size=self.batch_size,
                    on_prediction=take,
                )
            if why is not None:
                self._log_once(why)
                self._in_fixed_batches(examples, take)
        return found

    def _log_once(self, why: str) -> None:
        if (
            self.log is not None
            and isinstance(self.task, RowsTask)
            and why not in _LOGGED.setdefault(self.model, set())
        ):
            _LOGGED[self.model].add(why)
            self.log(f"answers come in fixed batches, each as long as its longest answer: {why}")

    def _in_fixed_batches(self, examples: Sequence[Example], take: Callable[[int, Prediction], object]) -> None:
        """Predict the rows of this process in batches, each of which ends with its longest answer."""
        process, processes = self.process
        order = _by_length(range(process, len(examples), processes), examples)
        # Every process runs the same number of batches: with a sharded base, each waits for the others' forwards.
        for start in range(0, math.ceil(len(examples) / processes), self.batch_size):
            rows = order[start : start + self.batch_size]
            batch = self.prompt_batch([examples[i] for i in rows or [0]]).to(self.model.device, self.model.dtype)
            for row, prediction in zip(rows, self.task.predict(self.model, batch), strict=bool(rows)):
                take(row, prediction)


def _by_length(rows: Sequence[int], examples: Sequence[Example]) -> list[int]:
    """Return rows such that those of similar length are together, since a batch of them needs less padding."""
    return sorted(rows, key=lambda i: (len(str(examples[i].prompt)), i))


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
