"""What trains, in a model that is otherwise frozen: its mode, and whether it learns at all."""

from __future__ import annotations

from typing import TYPE_CHECKING

from finetune.errors import TrainingError

if TYPE_CHECKING:
    from torch import nn

    from finetune.interfaces import Attachment


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


def refuse_dead(attachment: Attachment, backward: int) -> None:
    """Raises TrainingError when a tensor that must have a gradient after this ``backward``, from 1, has none."""
    dead = [
        name
        for name, parameter in attachment.parameters.items()
        if attachment.alive_after.get(name) == backward
        and (parameter.grad is None or not bool((parameter.grad != 0).any()))
    ]
    if dead:
        raise TrainingError(
            f"{len(dead)} adapter tensors get no gradient that is not zero, so they would never learn: "
            f"{', '.join(dead[:8])}{' ...' if len(dead) > 8 else ''}. Leave their modules out of method.towers."
        )
