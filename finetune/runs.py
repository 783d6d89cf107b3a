"""What recipes and the command do: train, evaluate."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from accelerate import Accelerator
from accelerate.utils import set_seed

from finetune.adapters.reference import AdapterRef, check_alias
from finetune.build import Base, base_of, examples_of, method_of
from finetune.errors import RecipeError, TrainingError
from finetune.registry import AdapterRegistry
from finetune.saving import save_adapter, save_weights
from finetune.serving.app import VisionLanguageModel, remember_base
from finetune.training.evaluate import Scores, predict, score
from finetune.training.evaluate import evaluate as judge
from finetune.training.log import RunLog
from finetune.training.loop import Trainer

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from torch import Tensor

    from finetune.example import Example
    from finetune.interfaces import Attachment
    from finetune.recipe import Recipe


@dataclass(frozen=True)
class RunResult:
    """What a training run leaves."""

    folder: Path  # the run's
    adapter: Path  # the best adapter, complete with its manifest
    ref: str | None  # in the registry, when the recipe publishes
    before: Scores | None
    after: Scores | None


def train(recipe: Recipe, *, registry: AdapterRegistry | None = None) -> RunResult:
    """Runs a recipe: train, judge on the test split before and after, save, publish.

    Args:
        recipe: from ``load_recipe``.
        registry: where to publish; the default one if None.

    Raises:
        FinetuneError: anything that stops the run, with what to do.
    """
    _check_names(recipe)
    accelerator = Accelerator(gradient_accumulation_steps=1, cpu=recipe.model.device == "cpu")
    _check_launch(accelerator, recipe)
    set_seed(recipe.seed)
    main, folder = accelerator.is_main_process, recipe.run_folder
    if main:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "recipe.json").write_text(json.dumps(recipe.model_dump(mode="json"), indent=2) + "\n")
    accelerator.wait_for_everyone()
    log = RunLog(folder, every=recipe.train.logging_steps, main=main)
    base = base_of(recipe, device=str(accelerator.device))
    with accelerator.main_process_first():  # the others find what it looked up in the cache
        splits = {name: examples_of(recipe, name, base=base, say=log.say) for name in ("train", "val", "test")}
    log.say(f"base {recipe.model.name_or_path} ({base.identity.model_type}, {base.identity.digest[:12]})")
    log.say("rows " + ", ".join(f"{name} {len(rows)}" for name, rows in splits.items()))
    for example in splits["train"][:3]:
        log.say(f"  {base.collator.show(example)}")
    before = _judge(base, recipe, splits["test"], accelerator, log, "base")
    attachment = method_of(recipe).attach(base.model, base.family.towers(base.model))
    log.say(f"{recipe.method.name} adapter\n{attachment.describe()}")
    steps = _fit(recipe, base, attachment, splits, accelerator, log)
    after = _judge(base, recipe, splits["test"], accelerator, log, "adapter")
    ref = None
    if main:
        remember_base(base.identity, base.path)
        save_adapter(folder / "adapter", recipe, base, attachment, splits, before, after, steps=steps)
        log.say(f"adapter saved in {folder / 'adapter'}")
        if recipe.adapter.publish:
            registry = registry or AdapterRegistry()
            ref = registry.publish(folder / "adapter", recipe.adapter.publish, aliases=recipe.adapter.aliases).ref
            log.say(f"published {ref}")
    accelerator.wait_for_everyone()
    return RunResult(folder, folder / "adapter", ref, before, after)


def _fit(
    recipe: Recipe,
    base: Base,
    attachment: Attachment,
    splits: dict[str, list[Example]],
    accelerator: Accelerator,
    log: RunLog,
) -> int:
    """Trains, leaves the best weights in the model, and returns the optimizer steps behind them."""
    task, folder, main = base.task(recipe.task), recipe.run_folder, accelerator.is_main_process
    collate = base.collator.training_batch
    trainer = Trainer(base.model, attachment, task, collate, recipe.train, accelerator, seed=recipe.seed)
    best: dict[str, Tensor] = {}

    def keep() -> None:
        best.update(_copy(attachment))
        if main:
            save_weights(folder / "best", attachment, best)

    def validate() -> float:
        base.model.eval()
        answers = predict(
            base.model,
            task,
            splits["val"],
            base.collator.prompt_batch,
            batch_size=recipe.train.eval_batch_size,
            accelerator=accelerator,
            title="validating",
        )
        return score(task, splits["val"], answers).exact_match

    state = trainer.train(splits["train"], log, validate=validate if splits["val"] else None, on_better=keep)
    if main:
        save_weights(folder / "last", attachment, _copy(attachment))
    with torch.no_grad():
        for name, weights in best.items():
            attachment.parameters[name].copy_(weights)
    base.model.eval()
    return state.best_step or state.step


def _copy(attachment: Attachment) -> dict[str, Tensor]:
    return {name: parameter.detach().cpu().clone() for name, parameter in attachment.parameters.items()}


def evaluate(
    refs: Sequence[str],
    recipes: Sequence[Recipe],
    *,
    registry: AdapterRegistry | None = None,
    predictions: dict[tuple[str, str], list[str]] | None = None,
) -> list[dict[str, Any]]:
    """Judges each adapter on the test split of each recipe, all on one base that is loaded once.

    Args:
        refs: registry references, adapter folders, or ``base``.
        recipes: all must name the same base.
        registry: where names are looked up; the default one if None.
        predictions: filled with (ref, recipe name) -> one answer a row, where given.

    Returns:
        One row per adapter and recipe: adapter, config, exact_match, interval, majority, blank_image, n, by_kind.
    """
    places = {(r.model.name_or_path, r.model.revision, r.model.dtype) for r in recipes}
    if len(places) != 1:
        raise RecipeError(
            f"the configs name {len(places)} bases ({', '.join(sorted(str(p[0]) for p in places))}); adapters are "
            "compared on one"
        )
    base = base_of(recipes[0])
    vlm = VisionLanguageModel(base, registry=registry or AdapterRegistry())
    rows = []
    for recipe in recipes:
        examples = examples_of(recipe, "test", base=base)
        if not examples:
            raise RecipeError(f"{recipe.name}: the recipe has no test split to judge on")
        for ref in refs:
            with vlm.using(None if ref == "base" else ref):
                scores, answers = judge(
                    base.model,
                    base.task(recipe.task),
                    examples,
                    base.collator.prompt_batch,
                    batch_size=recipe.train.eval_batch_size,
                    title=f"{ref} on {recipe.name}",
                )
            rows.append({"adapter": ref, "config": recipe.name, **scores.to_json()})
            if predictions is not None:
                predictions[ref, recipe.name] = answers
    return rows


def table(rows: Sequence[dict[str, Any]]) -> str:
    """Returns the rows of ``evaluate`` as a table for people."""
    head = ("adapter", "config", "exact match", "95 % interval", "majority", "blank image", "rows")
    lines = [head] + [
        (
            row["adapter"],
            row["config"],
            f"{row['exact_match']:.3f}",
            f"{row['interval'][0]:.3f} to {row['interval'][1]:.3f}",
            f"{row['majority']:.3f}",
            f"{row['blank_image']:.3f}",
            str(row["n"]),
        )
        for row in rows
    ]
    widths = [max(len(line[i]) for line in lines) for i in range(len(head))]
    return "\n".join("  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)) for line in lines)


def _check_names(recipe: Recipe) -> None:
    """Refuses, before hours of training, a name that could not be saved or published after them."""
    AdapterRef.parse_name(recipe.adapter.publish or f"{recipe.domain}/{recipe.name}")
    for alias in recipe.adapter.aliases:
        check_alias(alias)


def _check_launch(accelerator: Accelerator, recipe: Recipe) -> None:
    asked = os.environ.get("FINETUNE_NUM_PROCESSES")
    if asked and int(asked) != accelerator.num_processes:
        raise TrainingError(
            f"{asked} processes were asked for, but this run has {accelerator.num_processes}. On a CPU use "
            "NPROC=N ./launch.sh CONFIG: accelerate launch --cpu starts one process only."
        )
    if accelerator.mixed_precision != "no":
        raise TrainingError(
            f"accelerate's mixed_precision is {accelerator.mixed_precision}; the recipe's model.dtype says what the "
            "base is held in. Set mixed_precision: no in the accelerate config."
        )
    if recipe.model.device not in ("auto", accelerator.device.type):
        raise TrainingError(f"model.device is {recipe.model.device}, but accelerate gives {accelerator.device}")


def _judge(
    base: Base, recipe: Recipe, examples: list[Example], accelerator: Accelerator, log: RunLog, who: str
) -> Scores | None:
    """Judges the model as it is on ``examples``, and keeps every prediction; None where there are no rows."""
    if not examples:
        return None
    scores, answers = judge(
        base.model,
        base.task(recipe.task),
        examples,
        base.collator.prompt_batch,
        batch_size=recipe.train.eval_batch_size,
        accelerator=accelerator,
        title=f"judging the {who}",
    )
    if accelerator.is_main_process:
        _write_predictions(recipe.run_folder / f"predictions-{who}.jsonl", examples, answers)
    low, high = scores.interval
    log.say(
        f"{who} on test: exact match {scores.exact_match:.3f} ({low:.3f} to {high:.3f}), majority answer "
        f"{scores.majority:.3f}, blank image {scores.blank_image:.3f}, {scores.n} rows"
    )
    for kind, part in scores.by_kind.items():
        log.say(f"  {part['exact_match']:.3f} (majority {part['majority']:.3f}, {part['n']} rows)  {kind}")
    return scores


def _write_predictions(path: Path, examples: list[Example], answers: list[str]) -> None:
    with path.open("w", encoding="utf-8") as file:
        for example, said in zip(examples, answers, strict=True):
            line = {"id": example.id, "kind": example.kind, "prediction": said, "answers": example.answers}
            file.write(json.dumps(line, ensure_ascii=False) + "\n")
