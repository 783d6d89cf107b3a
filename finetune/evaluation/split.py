"""Evaluation on a split as a recipe puts it, in a run or afterwards; a run keeps every prediction."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

from finetune.errors import DataError
from finetune.evaluation.base_predictions import BasePredictions
from finetune.evaluation.cells import words
from finetune.evaluation.evaluate import Evaluation, evaluate
from finetune.evaluation.rows import make_rows
from finetune.evaluation.scores import Scores
from finetune.json_file import write_json
from finetune.metrics.names import BASE
from finetune.outside_text import safe_line
from finetune.prediction import prediction_from_json
from finetune.training.memory import any_process

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from pathlib import Path

    from accelerate import Accelerator

    from finetune.batch import Batch
    from finetune.build import Base
    from finetune.evaluation.scores import Value
    from finetune.example import Example
    from finetune.interfaces import Task
    from finetune.recipe import Recipe
    from finetune.training.log import RunLog


def evaluate_run(
    base: Base,
    recipe: Recipe,
    prompt_batch: Callable[[Sequence[Example]], Batch],
    examples: list[Example],
    accelerator: Accelerator,
    log: RunLog,
    who: str,
    *,
    known: bool = False,
) -> Evaluation:
    """Evaluate the model as it is on the test rows of a run, and keep every prediction in the run's folder.

    Args:
        base: the base, with the adapter in it or without.
        recipe: of the run.
        prompt_batch: makes the inputs of rows that are to be answered.
        examples: the test rows.
        accelerator: of the run.
        log: of the run.
        who: ``base`` or ``adapter``.
        known: take the predictions that are there already, where they are of these rows.
    """
    found = _read(recipe, who, base.task(recipe.task), examples) if known else None
    if any_process(accelerator, found is None):
        found = evaluate_split(
            base, recipe, prompt_batch, examples, who, title=f"evaluating the {who}", accelerator=accelerator
        )
        if accelerator.is_main_process:
            _write(recipe.run_folder, found)
    assert found is not None
    _tell(found, log.say)
    return found


def evaluate_split(
    base: Base,
    recipe: Recipe,
    prompt_batch: Callable[[Sequence[Example]], Batch],
    examples: list[Example],
    who: str,
    *,
    title: str,
    accelerator: Accelerator | None = None,
) -> Evaluation:
    """Evaluate the model as it is on ``examples``, which are put as the recipe has it.

    What the base alone predicts (``who`` is ``base``) is kept on this machine, and used again.
    """
    scores, rows = evaluate(
        base.model,
        base.task(recipe.task),
        examples,
        prompt_batch,
        batch_size=recipe.train.eval_batch_size,
        accelerator=accelerator,
        title=title,
        kept=_kept(base, recipe, accelerator) if who == BASE else None,
    )
    return Evaluation(adapter=who, config=recipe.name, scores=scores, rows=rows)


def _kept(base: Base, recipe: Recipe, accelerator: Accelerator | None) -> BasePredictions:
    processes = accelerator.num_processes if accelerator else 1
    return BasePredictions(base, recipe.task, recipe.train.eval_batch_size, processes)


def _tell(found: Evaluation, say: Callable[[str], None]) -> None:
    scores = found.scores
    for name, value in scores.values.items():
        within = f" ({value.interval[0]:.3f} to {value.interval[1]:.3f})" if value.interval else ""
        beside = "".join(f", {words(of)} {values[name]}" for of, values in scores.baselines.items() if name in values)
        say(f"{found.adapter} on test: {words(name)} {value}{within}{beside}, {value.n} rows")
    if scores.truncated:
        say(f"  {scores.truncated} of {scores.n} answers were cut at task.max_new_tokens")
    for kind, part in scores.by_kind.items():
        told = [_of_kind(name, value, part) for name, value in part.values.items()]
        say(f"  {'; '.join(told)}, {part.n} rows  {safe_line(kind)}")


def _of_kind(name: str, value: Value, part: Scores) -> str:
    beside = "".join(f", {words(of)} {values[name]}" for of, values in part.baselines.items() if name in values)
    return f"{words(name)} {value}{beside}"


def _write(folder: Path, found: Evaluation) -> None:
    """Write every prediction, then the scores."""
    with (folder / f"predictions-{found.adapter}.jsonl").open("w", encoding="utf-8") as file:
        for row in found.rows:
            file.write(json.dumps(row.to_json(), ensure_ascii=False) + "\n")
    write_json(folder / f"scores-{found.adapter}.json", found.scores.to_json())


def _read(recipe: Recipe, who: str, task: Task, examples: Sequence[Example]) -> Evaluation | None:
    """Return what ``_write`` wrote about these rows, or None where it is not there whole."""
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
    return Evaluation(adapter=who, config=recipe.name, scores=scores, rows=make_rows(task, examples, predictions))
