"""Evaluation of rows with the prompts of a recipe, in a run or afterwards; a run keeps every prediction."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

from finetune.assemble.batches import Batches
from finetune.core.json_file import write_json
from finetune.core.outside_text import safe_line
from finetune.core.prediction import prediction_from_json
from finetune.errors import DataError
from finetune.evaluation.base_predictions import BasePredictions
from finetune.evaluation.cells import words
from finetune.evaluation.evaluate import Evaluation, evaluate_rows
from finetune.evaluation.measured import Measured
from finetune.evaluation.predict import Predictor
from finetune.evaluation.rows import make_rows
from finetune.evaluation.scores import Scores
from finetune.metrics.building import metrics_of
from finetune.training.memory import any_process

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from pathlib import Path

    from accelerate import Accelerator

    from finetune.assemble.base import Base
    from finetune.core.batch import Batch
    from finetune.core.example import Example
    from finetune.core.prediction import Prediction
    from finetune.interfaces import Task
    from finetune.recipe import Recipe
    from finetune.training.log import RunLog


def predictor_of(
    base: Base,
    recipe: Recipe,
    prompt_batch: Callable[[Sequence[Example]], Batch],
    *,
    alone: bool,
    accelerator: Accelerator | None = None,
    log: Callable[[str], None] | None = None,
) -> Predictor:
    """Return the predictor of rows with the prompts of a recipe, and the model in its present state.

    Args:
        base: the base, with or without an adapter.
        recipe: the recipe, whose task makes the prompts.
        prompt_batch: the function that makes the inputs of rows without their answers.
        alone: whether the base predicts without an adapter; this machine stores such predictions for the next run.
        accelerator: the accelerator of the run.
        log: the function that gets a line for the user; None for no lines.
    """
    batch_size, processes = recipe.train.eval_batch_size, accelerator.num_processes if accelerator else 1
    return Predictor(
        model=base.model,
        task=base.task(recipe.task),
        prompt_batch=prompt_batch,
        prompt_parts=Batches(base.collator_of(recipe.task), None).prompt_parts,
        batch_size=batch_size,
        accelerator=accelerator,
        log=log,
        kept=BasePredictions(base, recipe.task, batch_size, processes) if alone else None,
    )


def evaluate_run(
    predictor: Predictor,
    examples: list[Example],
    recipe: Recipe,
    log: RunLog,
    who: str,
    *,
    known: bool = False,
    probe: Sequence[Prediction | None] | None = None,
) -> Evaluation:
    """Evaluate the model in its present state on the test rows of a run, and write all predictions to the run's folder.

    Args:
        predictor: the predictor of the rows, on all processes of the run.
        examples: the test rows.
        recipe: the recipe of the run.
        log: the log of the run.
        who: the name of the model: ``base`` or ``adapter``.
        known: whether to use stored predictions, if they are of these rows.
        probe: the predictions of a linear probe for these rows, as ``score`` has them.
    """
    accelerator = predictor.accelerator
    assert accelerator is not None, "a run has one"
    found = _read(recipe, who, predictor.task, examples) if known else None
    if any_process(accelerator, found is None):
        scores, rows = evaluate_rows(predictor, examples, title=f"evaluating the {who}", probe=probe)
        found = Evaluation(adapter=who, config=recipe.name, scores=scores, rows=rows)
        if accelerator.is_main_process:
            _write(recipe.run_folder, found)
    assert found is not None
    _log(found, log.info)
    return found


def _log(found: Evaluation, log: Callable[[str], None]) -> None:
    scores = found.scores
    for name, value in scores.values.items():
        within = f" ({value.interval[0]:.3f} to {value.interval[1]:.3f})" if value.interval else ""
        log(f"{found.adapter} on test: {words(name)} {value}{within}{_beside(name, scores)}, {value.n} rows")
    if scores.truncated:
        log(f"  {scores.truncated} of {scores.n} answers were cut at task.max_new_tokens")
    for question_type, part in scores.by_question_type.items():
        texts = [f"{words(name)} {value}{_beside(name, part)}" for name, value in part.values.items()]
        log(f"  {'; '.join(texts)}, {part.n} rows  {safe_line(question_type)}")


def _beside(name: str, scores: Scores) -> str:
    """Return the values of the baselines beside that of a metric."""
    found = {of: scores.beside(of, name) for of in scores.baselines}
    return "".join(f", {words(of)} {value}" for of, value in found.items() if value is not None)


def _write(folder: Path, found: Evaluation) -> None:
    """Write every prediction, then the scores."""
    with (folder / f"predictions-{found.adapter}.jsonl").open("w", encoding="utf-8") as file:
        for row in found.rows:
            file.write(json.dumps(row.to_json(), ensure_ascii=False) + "\n")
    write_json(folder / f"scores-{found.adapter}.json", found.scores.to_json())


def _read(recipe: Recipe, who: str, task: Task, examples: Sequence[Example]) -> Evaluation | None:
    """Return the evaluation that ``_write`` wrote for these rows; None if a file is missing or incomplete."""
    folder = recipe.run_folder
    try:
        lines = (folder / f"predictions-{who}.jsonl").read_text(encoding="utf-8").split("\n")[:-1]
        rows = [json.loads(line) for line in lines]
        if [row["id"] for row in rows] != [example.id for example in examples]:
            return None
        predictions = [prediction_from_json(row["prediction"]) for row in rows]
        scores = Scores.from_json(json.loads((folder / f"scores-{who}.json").read_text(encoding="utf-8")))
    except (OSError, ValueError, LookupError, TypeError, DataError):
        return None
    if list(scores.values) != list(task.options.metrics or task.metrics):
        return None
    measured = Measured(metrics_of(task), examples, predictions)
    return Evaluation(adapter=who, config=recipe.name, scores=scores, rows=make_rows(task, measured))
