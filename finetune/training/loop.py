"""The one training loop, for every task and method.

Accumulation is by counts: each term's sum is divided by the number of its items in the whole window, over all
micro-batches and processes, so batch 8 x 1 and 1 x 8 give the same gradient whatever the rows' lengths.
"""

from __future__ import annotations

import math
import time
from contextlib import nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import nn
from torch.utils.data import DataLoader, Dataset

from finetune.errors import TrainingError
from finetune.training.plan import Plan, learning_rate_factor

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from accelerate import Accelerator
    from torch import Tensor
    from transformers import PreTrainedModel

    from finetune.example import Example
    from finetune.interfaces import Attachment, Batch, CoupledTask, Task
    from finetune.recipe import TrainSection
    from finetune.training.log import RunLog


@dataclass
class TrainState:
    """Where a run stands."""

    step: int = 0  # optimizer steps done
    best_score: float = -math.inf
    best_step: int = 0
    validations_without_better: int = 0


class _Rows(Dataset):
    """Hands (row, learnt) pairs through a DataLoader to the collator."""

    def __init__(self, examples: list[Example]):
        self.examples = examples

    def __len__(self) -> int:
        return len(self.examples)

    def __getitem__(self, index: tuple[int, bool]) -> tuple[Example, bool]:
        return self.examples[index[0]], index[1]


class Trainer:
    """Trains what a method attached; everything that differs between tasks comes in through ``task``.

    Args:
        model: the adapted model, on its device.
        attachment: what trains.
        task: terms and their counts.
        collate: makes a training batch of (example, learnt) pairs.
        options: the recipe's train section.
        accelerator: with gradient_accumulation_steps=1; accumulation is this loop's own.
        seed: of the order of rows.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        attachment: Attachment,
        task: Task,
        collate: Callable[[list[tuple[Example, bool]]], Batch],
        options: TrainSection,
        accelerator: Accelerator,
        *,
        seed: int,
    ):
        self.task, self.collate, self.options, self.seed = task, collate, options, seed
        self.accelerator, self.attachment = accelerator, attachment
        self.parameters = list(attachment.parameters.values())
        self.optimizer = torch.optim.AdamW(self.parameters, lr=options.learning_rate, weight_decay=options.weight_decay)
        self.plain_model = model
        self.model = accelerator.prepare(model)
        self.state = TrainState()

    def train(
        self,
        examples: list[Example],
        log: RunLog,
        *,
        validate: Callable[[], float] | None = None,
        on_better: Callable[[], None] | None = None,
    ) -> TrainState:
        """Runs to the end, or until early stopping.

        Args:
            examples: the rows to learn.
            log: where progress goes.
            validate: returns a score, higher is better; called every ``eval_steps`` and at the end.
            on_better: called when a validation was the best so far.

        Raises:
            TrainingError: a dead parameter, or a gradient that is not finite.
        """
        plan = Plan.of(
            self.options, num_rows=len(examples), num_processes=self.accelerator.num_processes, seed=self.seed
        )
        every = self.options.eval_steps or plan.steps_per_epoch
        process = self.accelerator.process_index
        loader = DataLoader(
            _Rows(examples),
            batch_sampler=plan.stream(self.state.step, process),
            collate_fn=self.collate,
            num_workers=self.options.num_workers,
        )
        stream = iter(loader)
        log.start(plan.total_steps)
        set_train_mode(self.plain_model, self.attachment)
        for step in range(self.state.step, plan.total_steps):
            started = time.monotonic()
            window = [next(stream) for _ in plan.micro_batches(step, process)]
            values = self._step(step, window, plan)
            log.step(step + 1, seconds=time.monotonic() - started, **values)
            self.state.step = step + 1
            last = step + 1 == plan.total_steps
            if validate and ((step + 1) % every == 0 or last):
                score = validate()
                set_train_mode(self.plain_model, self.attachment)
                self._note_score(score, log, on_better)
                patience = self.options.early_stopping_patience
                if patience and self.state.validations_without_better >= patience:
                    log.say(f"stopped early: no better score in {patience} validations")
                    break
        log.finish()
        return self.state

    def _step(self, step: int, window: list[Batch], plan: Plan) -> dict[str, Any]:
        """Makes one optimizer step; returns what is logged about it."""
        device, dtype = self.accelerator.device, self.plain_model.dtype
        window = [batch.to(device, dtype) for batch in window]
        totals = self._totals(window)
        tokens = totals.pop("tokens")
        sums = self._backward_window(window, totals)
        loss_sums = {name: torch.stack([part[name] for part in sums]).sum() for name in totals}
        if step < 2:
            self._refuse_dead(step + 1)
        norm = nn.utils.clip_grad_norm_(self.parameters, self.options.max_grad_norm or math.inf)
        if not torch.isfinite(norm):
            ids = [example.id for batch in window for example in batch.examples]
            raise TrainingError(
                f"step {step + 1}: the gradient is not finite (norm {norm.item()}). Rows: {', '.join(ids[:32])}. "
                "Lower train.learning_rate, or look at these rows."
            )
        rate = self.options.learning_rate * learning_rate_factor(step, self.options, plan.total_steps)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        means = self._means(loss_sums, totals)
        return {
            "loss": sum(means.values()),
            **(means if len(means) > 1 else {}),
            "learning_rate": rate,
            "grad_norm": norm.item(),
            "epoch": (step + 1) / plan.steps_per_epoch,
            "samples": len(plan.rows(step)),
            "tokens": tokens,
        }

    def _backward_window(self, window: list[Batch], totals: Mapping[str, int]) -> list[dict[str, Tensor]]:
        """Runs the window forward and backward; returns for each micro-batch the sum of each term."""
        left = iter(range(len(window) - 1, -1, -1))

        def backward(loss: Callable[[], Tensor]) -> None:
            last = next(left) == 0
            # DeepSpeed steps at every backward unless told that gradients are not to be synchronised.
            self.accelerator.sync_gradients = last
            with nullcontext() if last else self.accelerator.no_sync(self.model):
                with self.accelerator.autocast():
                    value = loss()
                # Gradients are averaged over the processes, and are to be added up.
                self.accelerator.backward(value * self.accelerator.num_processes)

        if self.task.couples_rows:
            return cast("CoupledTask", self.task).backward_window(self.model, window, backward)
        sums: list[dict[str, Tensor]] = []
        for batch in window:

            def loss(batch: Batch = batch) -> Tensor:
                terms = self.task.terms(self.model, batch)
                sums.append({name: term.loss_sum.detach() for name, term in terms.items()})
                return torch.stack([term.loss_sum / max(1, totals[name]) for name, term in terms.items()]).sum()

            backward(loss)
        return sums

    def _totals(self, window: list[Batch]) -> dict[str, int]:
        """Adds up each term's items, and ``tokens``, over the window and all processes."""
        counts = {"tokens": sum(int(batch.inputs["attention_mask"].sum()) for batch in window)}
        for batch in window:
            for name, count in self.task.count_items(batch).items():
                counts[name] = counts.get(name, 0) + count
        if self.accelerator.num_processes == 1:
            return counts
        vector = torch.tensor(list(counts.values()), device=self.accelerator.device)
        return dict(zip(counts, self.accelerator.reduce(vector, "sum").tolist(), strict=True))

    def _means(self, loss_sums: Mapping[str, Tensor], totals: Mapping[str, int]) -> dict[str, float]:
        vector = torch.stack([value.float() for value in loss_sums.values()])
        vector = self.accelerator.reduce(vector.to(self.accelerator.device), "sum")
        return {name: total / max(1, totals[name]) for name, total in zip(loss_sums, vector.tolist(), strict=True)}

    def _refuse_dead(self, backward: int) -> None:
        """Stops the run when a tensor that must have a gradient by now has none, or one that is not finite."""
        dead = [
            name
            for name, parameter in self.attachment.parameters.items()
            if self.attachment.alive_after.get(name) == backward and not _alive(parameter.grad)
        ]
        if dead:
            raise TrainingError(
                f"{len(dead)} adapter tensors get no finite gradient that is not zero, so they would never learn: "
                f"{', '.join(dead[:8])}{' ...' if len(dead) > 8 else ''}. Leave their modules out of method.towers."
            )

    def _note_score(self, score: float, log: RunLog, on_better: Callable[[], None] | None) -> None:
        state = self.state
        better = score > state.best_score
        if better:
            state.best_score, state.best_step, state.validations_without_better = score, state.step, 0
            if on_better:
                on_better()
        else:
            state.validations_without_better += 1
        log.validation(state.step, score, better)


def set_train_mode(model: nn.Module, attachment: Attachment) -> None:
    """Puts what trains in training mode and leaves every frozen module in eval mode.

    A frozen batch norm in training mode would overwrite its running statistics, and with them the base.
    """
    model.eval()
    trainable = {id(p) for p in attachment.parameters.values()}
    for module in model.modules():
        if any(id(p) in trainable for p in module.parameters(recurse=False)):
            module.train()
    for name, module in model.named_modules():
        # Adapter layers keep their dropout in a container of their own, named after the adapter.
        if name.endswith(f"_dropout.{attachment.adapter_name}"):
            module.train()


def _alive(gradient: Tensor | None) -> bool:
    return gradient is not None and bool(torch.isfinite(gradient).all()) and bool((gradient != 0).any())
