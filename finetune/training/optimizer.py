"""The optimizer: how it is built, its rate, and its state by parameter name."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from collections.abc import Mapping

    from torch import Tensor, nn

    from finetune.interfaces import Attachment
    from finetune.recipe import TrainSection


def make_optimizer(attachment: Attachment, options: TrainSection) -> torch.optim.Optimizer:
    """Returns AdamW over what the methods attached, a group for each ratio to the recipe's learning rate."""
    by_ratio: dict[float, list[nn.Parameter]] = {}
    for name, parameter in attachment.parameters.items():
        by_ratio.setdefault(attachment.learning_rates.get(name, 1.0), []).append(parameter)
    groups = [{"params": parameters, "lr_ratio": ratio} for ratio, parameters in by_ratio.items()]
    return torch.optim.AdamW(groups, lr=options.learning_rate, weight_decay=options.weight_decay)


def set_learning_rate(optimizer: torch.optim.Optimizer, rate: float) -> None:
    """Sets the recipe's rate for the next step; each group has its ratio to it."""
    for group in optimizer.param_groups:
        group["lr"] = rate * group["lr_ratio"]


def optimizer_tensors(
    optimizer: torch.optim.Optimizer, parameters: Mapping[str, nn.Parameter]
) -> dict[str, dict[str, Tensor]]:
    """Returns parameter name -> slot (``exp_avg``, ``step``, ...) -> tensor; empty before the first step."""
    return {name: dict(optimizer.state[p]) for name, p in parameters.items() if p in optimizer.state}


def load_optimizer(
    optimizer: torch.optim.Optimizer,
    parameters: Mapping[str, nn.Parameter],
    tensors: Mapping[str, Mapping[str, Tensor]],
) -> None:
    """Puts back what ``optimizer_tensors`` returned."""
    optimizer.state.clear()
    for name, slots in tensors.items():
        parameter = parameters[name]
        # Torch keeps the number of steps, a scalar, on the CPU whatever the parameter's device.
        optimizer.state[parameter] = {
            slot: (tensor if tensor.ndim == 0 else tensor.to(parameter.device)).clone()
            for slot, tensor in slots.items()
        }
