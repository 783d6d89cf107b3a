"""The linear probe of a run: a baseline of its evaluations that trains no part of the base, and never stops the run."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

from finetune.core.batch import STORED_OUTPUTS
from finetune.data.stream import Stream
from finetune.errors import plain
from finetune.evaluation.linear_probe import LinearProbe
from finetune.runs.frozen_features import rows_of_plan
from finetune.runs.image_vectors import ImageVectors

if TYPE_CHECKING:
    from finetune.core.example import Example
    from finetune.core.prediction import Prediction
    from finetune.interfaces import Task, TaskCollator
    from finetune.runs.run import Run


def probe_run(run: Run, task: Task) -> list[Prediction | None] | None:
    """Return the predictions of a linear probe for the test rows of a run, before an adapter is attached.

    The probe is fitted to the train rows that the run reads. It logs its work, or the reason why there is no probe.

    Args:
        run: the run.
        task: the task of the run.

    Returns:
        One prediction a row, None for rows that the probe does not cover; None if there is no probe.
    """
    if not run.rows.test:
        return None
    started = time.monotonic()
    try:
        found = _predictions(run, task)
    except Exception as error:  # the run does not need this baseline
        found = f"{type(error).__name__}: {plain(str(error))}"
    if isinstance(found, str):
        run.log.info(f"linear probe off: {found}")
        return None
    predictions, questions, vectors = found
    covered = sum(one is not None for one in predictions)
    run.log.info(
        f"linear probe: {len(vectors)} images, {vectors.num_new} of them new; questions with a closed set of answers: "
        f"{questions}; {covered} of {len(predictions)} test rows; {time.monotonic() - started:.1f} s"
    )
    return predictions


def _predictions(run: Run, task: Task) -> tuple[list[Prediction | None], int, ImageVectors] | str:
    """Return the predictions, the number of questions and the vectors; or why there is no probe."""
    recipe, rows = run.recipe, run.rows
    if isinstance(rows.train, Stream):
        return "the train rows are a stream"
    if run.accelerator.num_processes > 1:
        return "the run has several processes"
    probe = LinearProbe(task, rows_of_plan(recipe, rows.train, 1))
    covered = probe.covered(rows.test)
    if not covered:
        return "no test row has an image and a question whose answers in the train rows are a closed set"
    vectors = ImageVectors(run.base, _collator(run, covered[0]), batch_size=min(16, recipe.train.eval_batch_size))
    return probe.predict(rows.test, val=rows.val, vectors=vectors), len(probe.questions), vectors


def _collator(run: Run, row: Example) -> TaskCollator:
    """Return the collator of the run if it stores all that the projector gets, else the one that opens images.

    Args:
        run: the run.
        row: a row with an image.
    """
    stored = run.collator.prompt_batch([row]).inputs.get(STORED_OUTPUTS, {})
    (projector, *_) = run.base.towers.get("projector", ("",))
    # Below a frozen projector the stored outputs are hollow: only the outputs of the projector itself are read.
    below = projector and stored and not any(f"{path}.".startswith(f"{projector}.") for path in stored)
    return run.collator if below else run.base.collator_of(run.recipe.task)
