"""The trainable part of a frozen model: its mode, and the check that every parameter trains."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from finetune.errors import TrainingError
from finetune.methods.peft_layers import ADAPTER_NAME

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import Tensor, nn

    from finetune.interfaces import Attachment


def set_train_mode(model: nn.Module, attachment: Attachment) -> None:
    """Put the trainable parts in training mode and leave every frozen module in eval mode.

    A frozen batch norm in training mode would overwrite its running statistics, and with them the base.
    """
    model.eval()
    trainable = {id(p) for p in attachment.parameters.values()}
    for module in model.modules():
        if any(id(p) in trainable for p in module.parameters(recurse=False)):
            module.train()
    for name, module in model.named_modules():
        # Adapter layers keep their dropout in a container of their own, named after the adapter.
        if name.endswith(f"_dropout.{ADAPTER_NAME}"):
            module.train()


class GradientCheck:
    """A check that each parameter of an adapter gets a gradient; it stops a run in which one would never train.

    A step whose rows hold no image does not count for the parameters in a vision tower.

    Args:
        attachment: the adapter that trains.
    """

    def __init__(self, attachment: Attachment):
        self._attachment = attachment
        self._reached = dict.fromkeys(attachment.parameters, 0)
        self._steps = 0

    def check(self, gradient: Callable[[nn.Parameter], Tensor | None], epoch: int) -> None:
        """Check the gradients of one step.

        Args:
            gradient: the function that returns a parameter's whole gradient; None if no row of the step reached it.
            epoch: the number of steps of an epoch, or of the whole run if that is shorter.

        Raises:
            TrainingError: a tensor that must have a gradient by now has only zeros, or no row of an epoch reached it.
        """
        self._steps += 1
        due: dict[str, Tensor] = {}
        alive_after = self._attachment.alive_after
        for name, parameter in self._attachment.parameters.items():
            if self._reached[name] >= alive_after.get(name, 1) or (found := gradient(parameter)) is None:
                continue
            self._reached[name] += 1
            if self._reached[name] == alive_after.get(name):
                due[name] = (found != 0).any()
        # One wait for the device for all tensors, and only in the first steps.
        alive = torch.stack([*due.values()]).tolist() if due else []
        dead = [name for name, lives in zip(due, alive, strict=True) if not lives]
        if dead:
            raise TrainingError(
                f"every adapter tensor must get a gradient that is not zero, but {len(dead)} of them have none and "
                f"would never train: {_first(dead)}. Remove their modules from method."
            )
        never = [n for n, count in self._reached.items() if count == 0 and alive_after.get(n, 1) <= self._steps]
        if never and self._steps == epoch:
            raise TrainingError(
                f"every adapter tensor must get a gradient, but no row of {self._steps} steps reached {len(never)} of "
                f"them: {_first(never)}. Check that rows have images, or remove these modules from method."
            )


def _first(names: list[str]) -> str:
    return f"{', '.join(names[:8])}{' ...' if len(names) > 8 else ''}"
