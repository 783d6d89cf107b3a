"""The one training loop, for every task and method.

Accumulation is by counts: each term's sum is divided by the number of its items in the whole step, over all
micro-batches and processes. So batch 8 x 1 and 1 x 8 give the same gradient for rows of any length.
"""

from __future__ import annotations

import math
import time
from contextlib import closing
from typing import TYPE_CHECKING, Any

import torch

from finetune.errors import StoppedError, TrainingError
from finetune.training.accumulation import accumulate_gradients, count_step_items
from finetune.training.finite import explain_not_finite
from finetune.training.gradient_checkpointing import recomputing
from finetune.training.memory import any_process, describe_halved, free_memory, halved, is_out_of_memory, too_much
from finetune.training.optimizer import make_optimizer, set_learning_rate
from finetune.training.plan import Plan, describe_padding, learning_rate_factor
from finetune.training.randomness import random_state, set_random_state
from finetune.training.replicated import Replicated
from finetune.training.rows import MicroBatchLoader
from finetune.training.state import Standing, TrainState
from finetune.training.stopping import Stopping, farewell
from finetune.training.trainable import GradientCheck, set_train_mode

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping
    from pathlib import Path

    from accelerate import Accelerator
    from transformers import PreTrainedModel

    from finetune.core.batch import Batch
    from finetune.core.example import Example
    from finetune.data.stream import Rows
    from finetune.interfaces import Attachment
    from finetune.recipe import TrainSection
    from finetune.training.accumulation import LossSums
    from finetune.training.checkpoint import Checkpoint, Checkpoints
    from finetune.training.log import RunLog
    from finetune.training.step import TaskObjective
    from finetune.training.validation import AnyValidation


class Trainer:
    """The trainer of an attached adapter; ``objective`` holds all differences between tasks.

    Args:
        model: the adapted model, on its device.
        attachment: the adapter that trains.
        objective: the objective, with its terms and their counts.
        collate: the function that makes a training batch of (example, supervised) pairs.
        options: the recipe's train section.
        accelerator: the accelerator, with gradient_accumulation_steps=1; this loop does accumulation itself.
        log: the log of the run.
        seed: the seed of the order of rows.
        strategy: the strategy by which processes share the work; None for processes that each hold the whole base.
        checkpoints: the checkpoints that keep the state; None keeps no state.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        attachment: Attachment,
        objective: TaskObjective,
        collate: Callable[[list[tuple[Example, bool]]], Batch],
        options: TrainSection,
        accelerator: Accelerator,
        log: RunLog,
        *,
        seed: int,
        strategy: Replicated | None = None,
        checkpoints: Checkpoints | None = None,
    ):
        self.objective, self.collate, self.options, self.seed = objective, collate, options, seed
        self.accelerator, self.attachment, self.log, self.checkpoints = accelerator, attachment, log, checkpoints
        self.plain_model, self.gradient_check = model, GradientCheck(attachment)
        self.strategy = strategy or Replicated(accelerator)
        self.strategy.prepare(model, attachment, make_optimizer(attachment, options), options)
        self.state = TrainState(batch_size=options.batch_size)
        self._standing = Standing(strategy=self.strategy, state=self.state)
        self.best = self._standing.best  # weights of the best validation
        self.random = random_state()  # as it was after the last whole step
        self._log_bytes = 0
        self._kept: Path | None = None  # the checkpoint of the present step, if there is one

    def restore(self, checkpoint: Checkpoint) -> None:
        """Restore the state of ``checkpoint``; the model must be prepared before.

        Raises:
            TrainingError: what trains now is not what trained then.
        """
        self.random = self._standing.unpack(checkpoint, process=self.accelerator.process_index)
        self._log_bytes, self._kept = checkpoint.facts["log_bytes"], checkpoint.path
        if checkpoint.extended:  # early stopping may have ended it; a longer run counts from 0 again
            self.state.validations_without_better = 0

    def train(
        self,
        examples: Rows,
        *,
        validate: Callable[[], AnyValidation] | None = None,
        on_better: Callable[[], None] | None = None,
    ) -> TrainState:
        """Run to the end, or until early stopping.

        Args:
            examples: the training rows.
            validate: the function that validates, called every ``eval_steps`` and at the end. The best score chooses
                the weights; of equal scores the lower loss does, and of equal losses the later step.
            on_better: the function that is called after the best validation so far, with its weights in ``best``.

        Raises:
            TrainingError: a parameter gets no gradient, a loss or gradient is not finite, or memory is too small for
                one row.
            StoppedError: a signal asked to stop; the state is saved.
        """
        options, state = self.options, self.state
        loader = MicroBatchLoader(examples, self.collate, accelerator=self.accelerator, num_workers=options.num_workers)
        lengths = None if self.objective.couples_rows else loader.lengths
        self.plan = plan = Plan.of(
            options,
            num_rows=loader.num_rows,
            num_processes=self.accelerator.num_processes,
            seed=self.seed,
            batch_size=state.batch_size,
            lengths=lengths if options.group_by_length else None,
        )
        if lengths:
            self.log.info(describe_padding(plan, lengths))
        eval_every = options.eval_steps or plan.steps_per_epoch
        self.log.start(plan.total_steps, done=state.step, size=self._log_bytes)
        set_train_mode(self.plain_model, self.attachment)
        set_random_state(self.random)
        recomputed = recomputing(self.plain_model, enabled=options.gradient_checkpointing)
        with (
            closing(self.log),
            closing(loader),
            recomputed,
            Stopping(main=self.accelerator.is_main_process) as stopping,
        ):
            while not self._is_finished:
                started = time.monotonic()
                values = self._update(*self._gradients(loader))
                state.step += 1
                self.random, self._kept = random_state(), None
                self.log.step(state.step, seconds=time.monotonic() - started, **values)
                if validate and (state.step % eval_every == 0 or state.step == plan.total_steps):
                    self._note(validate(), on_better)
                    set_train_mode(self.plain_model, self.attachment)
                    set_random_state(self.random)  # validation must not change training
                stop = stopping.agreed(self.accelerator)
                if stop or state.step % (options.save_steps or eval_every) == 0 or self._is_finished:
                    self._save()
                if stop:
                    raise StoppedError(farewell(state.step, plan.total_steps, self._kept), signum=stop)
        return state

    @property
    def _is_finished(self) -> bool:
        patience = self.options.early_stopping_patience or math.inf
        return self.state.validations_without_better >= patience or self.state.step >= self.plan.total_steps

    def _gradients(self, loader: MicroBatchLoader) -> tuple[list[Batch], list[LossSums], dict[str, int]]:
        """Compute the gradients of the next step, with smaller micro-batches if memory runs out.

        Returns:
            This process's micro-batches, the sums of the terms of each, and each term's items over all processes.
        """
        while True:
            micro_batches = loader.micro_batches(self.plan, self.state.step)
            totals = count_step_items(self.objective, micro_batches, self.accelerator)
            sums, failed = None, False
            try:
                sums = accumulate_gradients(
                    self.strategy, self.objective, micro_batches, totals, self.plain_model.dtype
                )
            except RuntimeError as error:
                if not is_out_of_memory(error):
                    raise
                if self.strategy.lockstep:
                    raise too_much(self.plan, self.state.step + 1) from error
                failed = True
            if not any_process(self.accelerator, failed):
                assert sums is not None
                self.strategy.add_up_gradients()
                return micro_batches, sums, totals
            del micro_batches, sums
            self.strategy.drop_gradients()
            free_memory()
            set_random_state(self.random)
            self.plan = plan = halved(self.plan, self.state.step + 1)
            self.state.batch_size = plan.batch_size
            self.log.info(f"step {self.state.step + 1}: out of memory. {describe_halved(plan)}")

    def _update(self, micro_batches: list[Batch], sums: list[LossSums], totals: Mapping[str, int]) -> dict[str, Any]:
        """Make one optimizer step of the gradients; return the values for its line in the log."""
        step, plan = self.state.step, self.plan
        norm = self.strategy.clip(self.options.max_grad_norm)
        terms = [name for name in totals if name != "tokens"]
        added = torch.stack([torch.stack([part[name].loss_sum for part in sums]).sum().float() for name in terms])
        added = self.accelerator.reduce(added, "sum")
        *numbers, norm = torch.cat([added, norm.reshape(1).to(added)]).tolist()  # the only wait for the device
        means = {name: number / max(1, totals[name]) for name, number in zip(terms, numbers, strict=True)}
        loss = sum(sums[0][name].weight * mean for name, mean in means.items())
        if not all(map(math.isfinite, (*means.values(), norm))):
            self._refuse_not_finite(micro_batches, sums, loss=loss, norm=norm)
        self.gradient_check.check(self.strategy.gradient, min(plan.steps_per_epoch, plan.total_steps))
        rate = self.options.learning_rate * learning_rate_factor(step, self.options, plan.total_steps)
        set_learning_rate(self.strategy.optimizer, rate)
        self.strategy.step()
        return {
            "loss": loss,
            **(means if len(means) > 1 else {}),
            "learning_rate": rate,
            "grad_norm": norm,
            "epoch": (step + 1) / plan.steps_per_epoch,
            "samples": len(plan.rows(step)),
            "tokens": totals["tokens"],
        }

    def _refuse_not_finite(self, micro_batches: list[Batch], sums: list[LossSums], *, loss: float, norm: float) -> None:
        """Save the state before the step, and stop the run with an error that names the rows.

        Raises:
            TrainingError: always.
        """
        alone = None if self.strategy.lockstep else self.collate
        why = explain_not_finite(self.plain_model, self.objective, alone, micro_batches, sums, loss=loss, norm=norm)
        kept = self._save()
        raise TrainingError(
            f"step {self.state.step + 1}: {why} Lower train.learning_rate, or check these rows."
            + (f" The state before this step is saved in {kept}." if kept else "")
        )

    def _note(self, validation: AnyValidation, on_better: Callable[[], None] | None) -> None:
        if chosen := self.state.note(validation):
            self.best.update({name: tensor.cpu().clone() for name, tensor in self.strategy.tensors().items()})
            if on_better:
                on_better()
        self.log.validation(self.state.step, validation, best=chosen)
        if (waited := self.state.validations_without_better) == self.options.early_stopping_patience:
            self.log.info(f"stopped early: no better score in {waited} validations in a row")

    def _save(self) -> Path | None:
        """Write a checkpoint; if that fails, log it and return None: earlier checkpoints stay, the run continues."""
        if self.checkpoints is None or self._kept:
            return self._kept
        held = self._standing.pack(self.random, log_bytes=self.log.size)
        self._kept = self.checkpoints.path(self.state.step)
        if self.accelerator.is_main_process:
            try:
                self.checkpoints.write(self.state.step, *held)
            except OSError as error:
                self.log.info(
                    f"step {self.state.step}: the checkpoint could not be written ({error.strerror}). Earlier "
                    "checkpoints are unchanged, and the run continues. Free disk space before the next checkpoint."
                )
                self._kept = None
        self.accelerator.wait_for_everyone()
        return self._kept
