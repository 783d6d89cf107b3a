"""Judging on a split as a recipe puts it, in a run or afterwards; a run keeps every prediction."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

from finetune.json_file import write_json
from finetune.outside_text import safe_line
from finetune.prediction import Prediction
from finetune.training.evaluate import Scores, evaluate
from finetune.training.memory import any_process

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from pathlib import Path

    from accelerate import Accelerator

    from finetune.batch import Batch
    from finetune.build import Base
    from finetune.example import Example
    from finetune.recipe import Recipe
    from finetune.training.log import RunLog


def judge_split(
    base: Base,
    recipe: Recipe,
    prompt_batch: Callable[[Sequence[Example]], Batch],
    examples: list[Example],
    accelerator: Accelerator,
    log: RunLog,
    who: str,
    *,
    known: bool = False,
) -> tuple[Scores, list[Prediction]]:
    """Judges the model as it is on ``examples``, and keeps every prediction; ``known``: takes those kept before."""
    judged = _read(recipe.run_folder, who, examples) if known else None
    if any_process(accelerator, judged is None):
        judged = answer_split(base, recipe, prompt_batch, examples, title=f"judging the {who}", accelerator=accelerator)
        if accelerator.is_main_process:
            _write(recipe.run_folder, who, examples, *judged)
    assert judged is not None
    scores = judged[0]
    low, high = scores.interval
    log.say(
        f"{who} on test: exact match {scores.exact_match:.3f} ({low:.3f} to {high:.3f}), majority answer "
        f"{scores.majority:.3f}, blank image {scores.blank_image:.3f}, {scores.n} rows"
    )
    if scores.truncated:
        log.say(f"  {scores.truncated} of {scores.n} answers were cut at task.max_new_tokens")
    for kind, part in scores.by_kind.items():
        log.say(f"  {part['exact_match']:.3f} (majority {part['majority']:.3f}, {part['n']} rows)  {safe_line(kind)}")
    return judged


def answer_split(
    base: Base,
    recipe: Recipe,
    prompt_batch: Callable[[Sequence[Example]], Batch],
    examples: list[Example],
    *,
    title: str,
    accelerator: Accelerator | None = None,
) -> tuple[Scores, list[Prediction]]:
    """Has the model as it is answer ``examples`` as the recipe puts them; returns scores and answers."""
    return evaluate(
        base.model,
        base.task(recipe.task),
        examples,
        prompt_batch,
        batch_size=recipe.train.eval_batch_size,
        accelerator=accelerator,
        title=title,
    )


def _write(folder: Path, who: str, examples: Sequence[Example], scores: Scores, said: Sequence[Prediction]) -> None:
    """Writes every prediction, then the scores."""
    with (folder / f"predictions-{who}.jsonl").open("w", encoding="utf-8") as file:
        for example, prediction in zip(examples, said, strict=True):
            line = {
                "id": example.id,
                "kind": example.kind,
                "prediction": prediction.text,
                "finish_reason": prediction.finish_reason,
                "answers": example.answers,
            }
            file.write(json.dumps(line, ensure_ascii=False) + "\n")
    write_json(folder / f"scores-{who}.json", scores.to_json())


def _read(folder: Path, who: str, examples: Sequence[Example]) -> tuple[Scores, list[Prediction]] | None:
    """Returns what ``_write`` wrote about these rows, or None where it is not there whole."""
    try:
        lines = (folder / f"predictions-{who}.jsonl").read_text(encoding="utf-8").split("\n")[:-1]
        scores = json.loads((folder / f"scores-{who}.json").read_text(encoding="utf-8"))
        rows = [json.loads(line) for line in lines]
        if [row["id"] for row in rows] != [example.id for example in examples]:
            return None
        said = [Prediction(text=row["prediction"], finish_reason=row.get("finish_reason", "stop")) for row in rows]
        return Scores(**{**scores, "interval": tuple(scores["interval"])}), said
    except (OSError, ValueError, LookupError, TypeError, AttributeError):
        return None
