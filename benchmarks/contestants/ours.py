"""Ours, assembled as in ``finetune.runs.train``, without and with the frozen-feature store."""

from __future__ import annotations

import time
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from accelerate import Accelerator
from accelerate.utils import set_seed

from benchmarks.contestants.parts import recipe_of
from benchmarks.measure import BenchmarkError
from finetune.assemble.batches import Batches
from finetune.assemble.loading import base_of
from finetune.assemble.rows import training_rows
from finetune.methods.adapter import attach
from finetune.runs.frozen_features import collator_of_run
from finetune.training.log import RunLog
from finetune.training.loop import Trainer

if TYPE_CHECKING:
    from benchmarks.contestants import Job
    from benchmarks.gate import Gate
    from finetune.core.batch import Batch
    from finetune.interfaces import Objective


def run(job: Job, gate: Gate) -> None:
    """Train without the store."""
    ours(job, gate, store=False)


def run_stored(job: Job, gate: Gate) -> None:
    """Precompute the store, which is reported separately, and train from it."""
    ours(job, gate, store=True)


def run_stored_images(job: Job, gate: Gate) -> None:
    """Train from a store of images alone, as where processes share one base."""
    ours(job, gate, store=True, images_alone=True)


def ours(job: Job, gate: Gate, *, store: bool, images_alone: bool = False) -> None:
    """Train through our own loop.

    Args:
        job: the work to do.
        gate: the gate that is called after every step.
        store: whether the outputs of frozen modules are computed only once.
        images_alone: whether no layers of the language model are among these modules.
    """
    recipe = recipe_of(job, store=store)
    accelerator = Accelerator(gradient_accumulation_steps=1, cpu=job.device == "cpu")
    set_seed(recipe.seed)
    base = base_of(recipe, device=str(accelerator.device))
    rows = training_rows(recipe, base=base)
    started = time.perf_counter()
    collator = collator_of_run(recipe, base, rows, [], [], accelerator, print, lockstep=images_alone)
    fill_seconds = time.perf_counter() - started if store else 0.0
    if (collator is not base.collator) != store:
        wanted, got = ("on", "off") if store else ("off", "on")
        raise BenchmarkError(f"the feature store must be {wanted}, got {got}")
    set_seed(recipe.seed)  # as in a run: finding the boundary of the store draws random numbers
    attachment = attach(base.host, recipe.method)
    batches = Batches(collator, attachment.placeholders)
    objective = base.objective(base.task(recipe.task), recipe.objectives, placeholders=attachment.placeholders)
    counted = _Counted(objective.objective)
    job.scratch.mkdir(parents=True, exist_ok=True)
    log = _GatedLog(job.scratch, every=recipe.train.logging_steps, gate=gate, counted=counted)
    trainer = Trainer(
        base.model,
        attachment,
        replace(objective, objective=counted),  # type: ignore[arg-type]
        batches.training_batch,
        recipe.train,
        accelerator,
        log,
        seed=recipe.seed,
    )
    gate.ready(base.model, fill_seconds=fill_seconds)
    trainer.train(rows)


class _Counted:
    """An objective that remembers how many tokens its last optimizer step supervised."""

    def __init__(self, objective: Objective):
        self._objective = objective
        self.supervised = 0

    def count_items(self, batch: Batch) -> dict[str, int]:
        counts = self._objective.count_items(batch)
        self.supervised = sum(counts.values())
        return counts

    def __getattr__(self, name: str) -> Any:
        return getattr(self._objective, name)


class _GatedLog(RunLog):
    """The run's log, which calls the gate after every step."""

    def __init__(self, *args: Any, gate: Gate, counted: _Counted, **options: Any):
        super().__init__(*args, **options)
        self._gate, self._counted = gate, counted

    def step(self, step: int, **values: Any) -> None:
        super().step(step, **values)
        self._gate.step(values["loss"], self._counted.supervised)
