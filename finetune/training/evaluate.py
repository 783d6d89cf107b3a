"""Judging a model on rows: one generation a row, every prediction kept, scores with what they must beat."""

from __future__ import annotations

import math
from collections import defaultdict
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np
from accelerate.utils import gather_object
from tqdm import tqdm

from finetune.tasks.metrics import bootstrap_interval, majority_score

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from accelerate import Accelerator
    from transformers import PreTrainedModel

    from finetune.batch import Batch
    from finetune.example import Example
    from finetune.interfaces import Task
    from finetune.prediction import Prediction

BLANK = np.full((224, 224, 3), 128, np.uint8)  # mid-grey


@dataclass(frozen=True, kw_only=True)
class Scores:
    """The scores of one model on one set of rows; shares of rows between 0 and 1, but for the counts."""

    exact_match: float
    interval: tuple[float, float]  # bootstrap over pictures, 95 %
    majority: float  # the most frequent answer of each question type, on these very rows
    blank_image: float | None  # the same model given grey pictures
    n: int
    by_kind: dict[str, dict[str, float]]  # question type -> exact_match, majority, n, blank_image
    truncated: int = 0  # rows whose answer was ended by its limit of tokens, not by the model

    def to_json(self) -> dict[str, Any]:
        """Returns plain data."""
        return asdict(self) | {"interval": list(self.interval)}


def predict(
    model: PreTrainedModel,
    task: Task,
    examples: Sequence[Example],
    prompt_batch: Callable[[Sequence[Example]], Batch],
    *,
    batch_size: int,
    accelerator: Accelerator | None = None,
    title: str = "evaluating",
) -> list[Prediction]:
    """Returns one prediction a row, in order; with an accelerator, each process answers its share.

    Args:
        model: in eval mode, on its device.
        task: how an answer is made.
        examples: the rows.
        prompt_batch: makes the inputs of rows that are to be answered.
        batch_size: rows a batch.
        accelerator: of a distributed run.
        title: for the progress bar.
    """
    process, processes = (accelerator.process_index, accelerator.num_processes) if accelerator else (0, 1)
    mine = range(process, len(examples), processes)
    # Rows of like length in one batch waste less padding; the order of answers is put right below.
    order = sorted(mine, key=lambda i: (len(str(examples[i].prompt)), i))
    answers: dict[int, Prediction] = {}
    with tqdm(total=len(order), unit="row", desc=title, disable=process != 0, leave=False, mininterval=1.0) as bar:
        # As many batches on every process: where they share one base, one would wait for the others' forwards.
        most = math.ceil(len(examples) / processes)
        for start in range(0, most, batch_size):
            rows = order[start : start + batch_size]
            batch = prompt_batch([examples[i] for i in rows or [0]]).to(model.device, model.dtype)
            answers.update(zip(rows, task.predict(model, batch), strict=bool(rows)))
            bar.update(len(rows))
    if accelerator and processes > 1:
        answers = dict(gather_object(list(answers.items())))
    return [answers[i] for i in range(len(examples))]


def blanked(examples: Sequence[Example]) -> tuple[list[Example], list[int]]:
    """Returns the rows with grey pictures, one for each prompt and kind, and each row's place among them."""
    unique: dict[tuple[str, str], int] = {}
    rows: list[Example] = []
    places: list[int] = []
    for example in examples:
        key = (str(example.prompt), example.kind)
        if key not in unique:
            unique[key] = len(rows)
            rows.append(replace(example, images=[BLANK] * len(example.images)))
        places.append(unique[key])
    return rows, places


def score(
    task: Task,
    examples: Sequence[Example],
    predictions: Sequence[Prediction],
    *,
    blank_predictions: Sequence[Prediction] | None = None,
) -> Scores:
    """Returns the scores of ``predictions``, one a row."""
    right = [task.is_correct(p.text, e) for p, e in zip(predictions, examples, strict=True)]
    blank = (
        [task.is_correct(p.text, e) for p, e in zip(blank_predictions, examples, strict=True)]
        if blank_predictions is not None
        else None
    )
    references = [task.reference(e) for e in examples]
    kinds = [e.kind for e in examples]
    rows_of: dict[str, list[int]] = defaultdict(list)
    for i, kind in enumerate(kinds):
        rows_of[kind].append(i)
    by_kind = {}
    for kind, rows in sorted(rows_of.items()):
        by_kind[kind] = {
            "exact_match": _mean([right[i] for i in rows]),
            "majority": majority_score([references[i] for i in rows], [kind] * len(rows)),
            "n": len(rows),
        }
        if blank is not None:
            by_kind[kind]["blank_image"] = _mean([blank[i] for i in rows])
    return Scores(
        exact_match=_mean(right),
        interval=bootstrap_interval(right, [_picture(e) for e in examples]),
        majority=majority_score(references, kinds),
        blank_image=None if blank is None else _mean(blank),
        n=len(examples),
        by_kind=by_kind,
        truncated=sum(prediction.finish_reason == "length" for prediction in predictions),
    )


def evaluate(
    model: PreTrainedModel,
    task: Task,
    examples: Sequence[Example],
    prompt_batch: Callable[[Sequence[Example]], Batch],
    *,
    batch_size: int,
    accelerator: Accelerator | None = None,
    title: str = "evaluating",
) -> tuple[Scores, list[Prediction]]:
    """Answers every row, and every prompt once more with a grey picture; returns scores and predictions."""
    common: dict[str, Any] = {"batch_size": batch_size, "accelerator": accelerator}
    predictions = predict(model, task, examples, prompt_batch, title=title, **common)
    rows, places = blanked(examples)
    on_blank = predict(model, task, rows, prompt_batch, title=f"{title}, with blank images", **common)
    scores = score(task, examples, predictions, blank_predictions=[on_blank[place] for place in places])
    return scores, predictions


def _picture(example: Example) -> str:
    return str(example.meta.get("picture", example.images[0] if example.images else example.id))


def _mean(values: Sequence[bool]) -> float:
    return sum(values) / max(1, len(values))
