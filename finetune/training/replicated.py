"""The plain strategy of a run: every process holds the whole base and the whole adapter."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from finetune.training.optimizer import load_optimizer, optimizer_tensors

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from accelerate import Accelerator
    from torch import Tensor

    from finetune.data.stream import Rows
    from finetune.interfaces import Attachment, Towers
    from finetune.recipe import TrainSection


class Replicated:
    """One process, or several that each hold everything (DDP); the base class of the other strategies.

    Each process keeps its own gradients until all micro-batches of the step are done; then they are summed in one
    vector. No process waits for another before that, so all of them can repeat the step if one runs out of memory.

    Args:
        accelerator: the accelerator of the run.
    """

    lockstep = False  # True if a forward or backward of one process waits for that of every other

    def __init__(self, accelerator: Accelerator):
        self.accelerator = accelerator
        self.attachment: Attachment
        self.model: Any
        self.optimizer: Any

    @property
    def load_device(self) -> str:
        """The device that the base is loaded on."""
        return str(self.accelerator.device)

    def check_rows(self, splits: Mapping[str, Rows]) -> None:
        """Refuse rows that the processes cannot train on together."""

    def split(self, model: nn.Module, towers: Towers) -> None:
        """Shard a base that was just loaded, before anything is attached to it."""

    def prepare(
        self, model: nn.Module, attachment: Attachment, optimizer: torch.optim.Optimizer, options: TrainSection
    ) -> None:
        """Take the adapter and its optimizer; afterwards ``model`` runs forward, and ``optimizer`` makes the steps."""
        self.attachment, self.optimizer = attachment, optimizer
        self.model = self.accelerator.prepare(model)

    @property
    def parameters(self) -> list[nn.Parameter]:
        """The parameters that train."""
        return list(self.attachment.parameters.values())

    def backward(self, loss: Callable[[], Tensor], *, last: bool) -> None:
        """Run one micro-batch forward and backward.

        Args:
            loss: the function that returns this process's share of the loss: its sum over the items of all processes.
            last: whether the micro-batch is the last of its step.
        """
        with self.accelerator.no_sync(self.model):
            value = loss()
            if value.requires_grad:  # rows without an image reach no parameter of an adapted vision tower
                self.accelerator.backward(value)

    def add_up_gradients(self) -> None:
        """Sum the gradients of all processes in one flat vector; a gradient that no process has stays None."""
        if self.accelerator.num_processes == 1:
            return
        parameters = self.parameters
        pieces = [torch.zeros_like(p) if p.grad is None else p.grad for p in parameters]
        reached = pieces[0].new_tensor([p.grad is not None for p in parameters])
        flat = self.accelerator.reduce(torch.cat([*(piece.flatten() for piece in pieces), reached]), "sum")
        *pieces, reached = flat.split([*(p.numel() for p in parameters), len(parameters)])
        for parameter, piece, count in zip(parameters, pieces, reached.tolist(), strict=True):
            parameter.grad = piece.view_as(parameter).clone() if count else None

    def gradient(self, parameter: nn.Parameter) -> Tensor | None:
        """Return a whole gradient, of all processes; None if no row of the step reached the parameter."""
        return parameter.grad

    def clip(self, max_norm: float | None) -> Tensor:
        """Clip the gradients to ``max_norm``, and return their norm before."""
        return nn.utils.clip_grad_norm_(self.parameters, max_norm or math.inf)

    def step(self) -> None:
        """Make the optimizer step."""
        self.optimizer.step()
        self.drop_gradients()

    def drop_gradients(self) -> None:
        """Drop the gradients of the backward passes."""
        self.optimizer.zero_grad(set_to_none=True)

    def tensors(self) -> dict[str, Tensor]:
        """Return saved name -> whole tensor of the adapter, and nothing of the base; every process has to call it."""
        return {name: parameter.detach() for name, parameter in self.attachment.parameters.items()}

    @torch.no_grad()
    def load(self, tensors: Mapping[str, Tensor]) -> None:
        """Write the tensors that ``tensors`` returned into the adapter; every process has to call it."""
        for name, parameter in self.attachment.parameters.items():
            parameter.copy_(tensors[name])

    def optimizer_tensors(self) -> dict[str, dict[str, Tensor]]:
        """Return parameter name -> slot -> whole tensor; empty before the first step; every process has to call it."""
        return optimizer_tensors(self.optimizer, self.attachment.parameters)

    def load_optimizer(self, tensors: Mapping[str, Mapping[str, Tensor]]) -> None:
        """Restore the tensors that ``optimizer_tensors`` returned; every process has to call it."""
        load_optimizer(self.optimizer, self.attachment.parameters, tensors)

    def finish(self) -> Attachment:
        """End training, and return the attachment with whole parameters; every process has to call it."""
        self.attachment.freeze()
        return self.attachment
