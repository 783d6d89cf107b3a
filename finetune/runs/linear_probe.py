"""The linear probe of a run: a baseline of its evaluations that trains no part of the base, and never stops the run."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

from finetune.data.stream import Stream
from finetune.errors import plain
from finetune.evaluation.linear_probe import LinearProbe
from finetune.runs.frozen_features import rows_of_plan
from finetune.runs.image_vectors import ImageVectors

if TYPE_CHECKING:
    from finetune.core.prediction import Prediction
    from finetune.interfaces import Task
    from finetune.runs.run import Run

_BATCH = 16  # the largest number of rows of a forward of the tower on an accelerator


def probe_run(run: Run, task: Task) -> list[Prediction | None] | None:
    """Return the predictions of a linear probe for the test rows of a run, before an adapter is attached.

    The probe is fitted to the train rows that the run reads. It logs its work, or the reason why there is no probe.
    Every process has to call it.

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
    recipe, rows, accelerator = run.recipe, run.rows, run.accelerator
    if isinstance(rows.train, Stream):
        return "the train rows are a stream"
    if run.strategy.lockstep:
        return "the processes share one base"
    probe = LinearProbe(task, rows_of_plan(recipe, rows.train, accelerator.num_processes))
    test = probe.covered(rows.test)
    if not test:
        return "no test row has an image and a question whose answers in the train rows are a closed set"
    vectors = ImageVectors(
        run.base,
        run.base.collator_of(recipe.task),
        stored=run.collator,
        # On a CPU a batch takes more time than its rows one by one: its large tensors are allocated each time.
        batch_size=1 if run.base.model.device.type == "cpu" else min(_BATCH, recipe.train.eval_batch_size),
    )
    if problem := vectors.fill([*probe.fitted_rows, *probe.covered(rows.val), *test], accelerator):
        return problem
    return probe.predict(rows.test, val=rows.val, vectors=vectors), len(probe.questions), vectors
