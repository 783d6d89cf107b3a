"""A training run: the objects that its steps share, and the code that makes them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from finetune.assemble.loading import base_of
from finetune.assemble.rows import check_rows
from finetune.core.outside_text import safe_line
from finetune.evaluation.split import predictor_of
from finetune.families.quantization import quantized_modules
from finetune.launch.threads import BusyCores
from finetune.methods.adapter import attach
from finetune.recipe import PromptSection
from finetune.runs.frozen_features import collator_of_run
from finetune.runs.run_folder import open_run
from finetune.runs.run_rows import read_run_rows
from finetune.runs.warm_start import Parent
from finetune.tasks.supervised_logits import why_all_logits
from finetune.training.log import RunLog
from finetune.training.trackers import start_trackers

if TYPE_CHECKING:
    from pathlib import Path

    from accelerate import Accelerator

    from finetune.assemble.base import Base
    from finetune.assemble.batches import Batches
    from finetune.evaluation.predict import Predictor
    from finetune.interfaces import Attachment, TaskCollator
    from finetune.recipe import Recipe
    from finetune.registry import AdapterRegistry
    from finetune.runs.run_rows import RunRows
    from finetune.training.checkpoint import Checkpoint, Checkpoints
    from finetune.training.replicated import Replicated


@dataclass(frozen=True, kw_only=True)
class Run:
    """The objects that the steps of a run share.

    Attributes:
        recipe: the recipe, with the settings that its rows determine.
        registry: the registry to publish in.
        strategy: the strategy by which the processes share the work.
        log: the log of the run.
        parent: the adapter that the run starts from; None for a fresh one.
        base: the base that the run adapts.
        rows: the rows of all splits.
        checkpoints: the checkpoints in the folder of the run.
        start: the checkpoint that the run resumes from; None for the beginning.
        collator: the collator of the rows, which takes features from the feature store where the run has one.
    """

    recipe: Recipe
    registry: AdapterRegistry
    strategy: Replicated
    log: RunLog
    parent: Parent | None
    base: Base
    rows: RunRows
    checkpoints: Checkpoints
    start: Checkpoint | None
    collator: TaskCollator

    @classmethod
    def load(cls, recipe: Recipe, strategy: Replicated, registry: AdapterRegistry) -> Run:
        """Load the base and the rows, place the base on the processes, and open the folder of the run.

        Args:
            recipe: the recipe as it was read.
            strategy: the strategy by which the processes share the work.
            registry: the registry to publish in.
        """
        accelerator = strategy.accelerator
        track = accelerator.log if recipe.train.trackers else None
        main = accelerator.is_main_process
        # Each of several processes would take the others for those of someone else.
        alone = accelerator.device.type == "cpu" and accelerator.num_processes == 1
        cores = BusyCores(torch.get_num_threads()) if alone else None
        log = RunLog(recipe.run_folder, every=recipe.train.logging_steps, main=main, track=track, cores=cores)
        parent = Parent.read(recipe.adapter.init_from, registry) if recipe.adapter.init_from else None
        with accelerator.main_process_first():  # the other processes use its notes about images
            check_rows(recipe)
        base = base_of(recipe, device=strategy.load_device)
        if parent:
            parent.require_base(base)
        with accelerator.main_process_first():  # the other processes use its cache
            rows = read_run_rows(recipe, base, log.info)
        recipe = rows.recipe
        strategy.check_rows(rows.splits)
        strategy.split(base.model, base.towers)
        _log_base(log, recipe, base, rows)
        checkpoints, start = open_run(
            recipe, base, rows.splits, accelerator, log.info, init_from=parent.ref if parent else None
        )
        start_trackers(accelerator, recipe)
        return cls(
            recipe=recipe,
            registry=registry,
            strategy=strategy,
            log=log,
            parent=parent,
            base=base,
            rows=rows,
            checkpoints=checkpoints,
            start=start,
            collator=collator_of_run(
                recipe,
                base,
                rows.train,
                rows.val,
                rows.test,
                accelerator,
                log.info,
                shown=[*rows.first, *rows.shapes.values()],
                lockstep=strategy.lockstep,
            ),
        )

    @property
    def accelerator(self) -> Accelerator:
        """The accelerator of the run."""
        return self.strategy.accelerator

    @property
    def folder(self) -> Path:
        """The folder of the run."""
        return self.recipe.run_folder

    def predictor(self, batches: Batches | TaskCollator, *, alone: bool) -> Predictor:
        """Return the predictor of rows by the base, ``alone`` or with the adapter."""
        return predictor_of(
            self.base,
            self.recipe,
            batches.prompt_batch,
            alone=alone,
            accelerator=self.accelerator,
            log=self.log.info,
        )

    def show_rows(self) -> None:
        """Log a few training rows in the form that the model gets, and keep them in the folder of the run."""
        shown = [safe_line(self.collator.show(row)) for row in self.rows.first]
        for row in shown:
            self.log.info(f"  {row}")
        if self.accelerator.is_main_process:
            (self.folder / "samples.txt").write_text("\n".join(shown) + "\n", encoding="utf-8")

    def attach(self) -> Attachment:
        """Attach a fresh adapter to the base, and give it the weights of its parent where it has one."""
        attachment = attach(self.base.host, self.recipe.parts)
        self.log.info(f"adapter\n{attachment.describe()}")
        if self.parent:
            self.parent.write_into(attachment, self.base)
            self.log.info(f"  its weights start from {self.parent.ref}")
        if isinstance(self.recipe.task, PromptSection) and (note := why_all_logits(self.base.model)):
            self.log.info(note)
        return attachment


def _log_base(log: RunLog, recipe: Recipe, base: Base, rows: RunRows) -> None:
    log.info(f"base {recipe.model.name_or_path} ({base.identity.model_type}, {base.identity.digest[:12]})")
    if base.quantization:
        names = quantized_modules(base.model)
        log.info(f"quantized to {base.quantization}: {len(names)} linear modules, {names[0]} to {names[-1]}")
    log.info(f"rows {rows.counts}")
