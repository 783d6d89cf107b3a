"""One micro-batch as an objective reads it, and the objective of a run over its task."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, cast

import torch

from finetune.errors import TrainingError
from finetune.methods.adapter import switch

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from torch import Tensor, nn
    from transformers import PreTrainedModel

    from finetune.core.batch import Batch, Placeholders
    from finetune.interfaces import CoupledObjective, LossSum, Objective, Outputs, Task


@dataclass(frozen=True)
class Reference:
    """The outputs of the base alone: of the model that trains, with its adapter switched off for one forward.

    It runs the plain model even if the loop runs a wrapped one: the forward has no gradient, so no process has to wait
    for the gradients of another.

    Attributes:
        model: the adapted model, not wrapped.
        outputs: the task's ``outputs``.
        placeholders: the places of a tuned prompt, which the base does not read; None without such a prompt.
    """

    model: PreTrainedModel
    outputs: Outputs
    placeholders: Placeholders | None

    @torch.no_grad()
    def __call__(self, batch: Batch) -> Tensor:
        """Return the outputs for a batch of the adapter; the model is unchanged afterwards, also after an error."""
        plain = self.placeholders.remove(batch) if self.placeholders else batch
        in_training: list[Any] = [module for module in self.model.modules() if module.training]
        self.model.eval()
        switch(self.model, False)
        try:
            return self.outputs(self.model, plain)
        finally:
            switch(self.model, True)
            for module in in_training:
                module.training = True


class Step:
    """A micro-batch with the outputs of the adapted model and of the base alone, each computed once.

    Args:
        model: the model as the loop runs it; it may be wrapped for several processes.
        batch: the micro-batch, on the model's device.
        outputs: the task's ``outputs``.
        reference: the function that returns the base's own outputs; None if the objective does not need them.
    """

    def __init__(self, model: nn.Module, batch: Batch, outputs: Outputs, reference: Callable[[Batch], Tensor] | None):
        self.model, self.batch = model, batch
        self._outputs = outputs
        # Before the forward: its graph takes memory, and its backward pass needs the adapter switched on.
        self._reference = reference(batch) if reference else None
        self._forward: Tensor | None = None

    def forward(self) -> Tensor:
        """Return the outputs of the adapted model, with gradient."""
        if self._forward is None:
            self._forward = self._outputs(self.model, self.batch)
        return self._forward

    def reference(self) -> Tensor:
        """Return the outputs of the base alone, without gradient.

        Raises:
            TrainingError: the objective has not set ``needs_reference``.
        """
        if self._reference is None:
            raise TrainingError("an objective must set needs_reference to True to use step.reference(); it is False")
        return self._reference


@dataclass(frozen=True)
class TaskObjective:
    """The objective of a run over its task.

    Attributes:
        task: the task, which gives the outputs.
        objective: the objective, which computes losses from the outputs.
        reference: the function that returns the outputs of the base alone.
        couples_rows: whether the loss of a row depends on the other rows of an optimizer step; if so, the objective is
            a ``CoupledObjective``.
    """

    task: Task
    objective: Objective
    reference: Callable[[Batch], Tensor]
    couples_rows: bool

    def count_items(self, batch: Batch) -> dict[str, int]:
        """Return the number of items that each term is a sum over, before any forward."""
        return self.objective.count_items(batch)

    def terms(self, model: nn.Module, batch: Batch) -> dict[str, LossSum]:
        """Return the loss terms of one micro-batch, by itself; ``model`` may be wrapped for several processes."""
        reference = self.reference if self.objective.needs_reference else None
        return self.objective.terms(Step(model, batch, self.task.outputs, reference))

    def accumulate_gradients(
        self, model: nn.Module, batches: Sequence[Batch], backward: Callable[[Callable[[], Tensor]], None]
    ) -> list[dict[str, Tensor]]:
        """Run the micro-batches of an optimizer step with coupled rows; arguments as for ``CoupledObjective``."""
        return cast("CoupledObjective", self.objective).accumulate_gradients(
            model, self.task.outputs, batches, backward
        )

    def choice_loss(self, model: nn.Module, batch: Batch) -> LossSum:
        """Return the loss of coupled rows, each compared with its own choices alone."""
        return cast("CoupledObjective", self.objective).choice_loss(model, batch)
