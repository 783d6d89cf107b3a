"""The optimizer of a run: its building, its learning rates, and its state by parameter name."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from finetune.errors import TrainingError

if TYPE_CHECKING:
    from collections.abc import Mapping

    from torch import Tensor, nn

    from finetune.interfaces import Attachment
    from finetune.recipe import TrainSection


_FUSED = ("cpu", "cuda", "mps", "xpu")  # devices on which torch's AdamW is one kernel for all tensors
_8BIT = ("cpu", "cuda", "xpu")  # devices on which bitsandbytes has its AdamW


def make_optimizer(attachment: Attachment, options: TrainSection) -> torch.optim.Optimizer:
    """Return AdamW over the parameters of the methods, a group for each ratio to the recipe's learning rate.

    Raises:
        TrainingError: the recipe's optimizer does not run on this device.
    """
    by_ratio: dict[float, list[nn.Parameter]] = {}
    for name, parameter in attachment.parameters.items():
        by_ratio.setdefault(attachment.learning_rates.get(name, 1.0), []).append(parameter)
    groups = [{"params": parameters, "lr_ratio": ratio} for ratio, parameters in by_ratio.items()]
    devices = {parameter.device.type for parameter in attachment.parameters.values()}
    if options.optim == "adamw_torch":
        fused = devices <= set(_FUSED)
        return torch.optim.AdamW(groups, lr=options.learning_rate, weight_decay=options.weight_decay, fused=fused)
    if strange := devices - set(_8BIT):
        raise TrainingError(
            f"train.optim {options.optim} runs only on {', '.join(_8BIT)}, got {', '.join(sorted(strange))}. Set "
            "train.optim: adamw_torch."
        )
    from bitsandbytes.optim import AdamW8bit  # the import takes seconds, so only runs that need it pay

    return AdamW8bit(groups, lr=options.learning_rate, weight_decay=options.weight_decay)


def set_learning_rate(optimizer: torch.optim.Optimizer, rate: float) -> None:
    """Set the recipe's rate for the next step; each group has its ratio to it."""
    for group in optimizer.param_groups:
        group["lr"] = rate * group["lr_ratio"]


def optimizer_tensors(
    optimizer: torch.optim.Optimizer, parameters: Mapping[str, nn.Parameter]
) -> dict[str, dict[str, Tensor]]:
    """Return parameter name -> slot (``exp_avg``, ``step``, ...) -> tensor; empty before the first step.

    A slot with a plain number, as bitsandbytes' count of steps, becomes a scalar tensor of whole numbers.
    """
    return {
        name: {slot: torch.as_tensor(value) for slot, value in optimizer.state[p].items()}
        for name, p in parameters.items()
        if p in optimizer.state
    }


def load_optimizer(
    optimizer: torch.optim.Optimizer,
    parameters: Mapping[str, nn.Parameter],
    tensors: Mapping[str, Mapping[str, Tensor]],
) -> None:
    """Restore the tensors that ``optimizer_tensors`` returned; the optimizer knows the device of each slot."""
    order = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    number = {parameter: i for i, parameter in enumerate(order)}
    state = {
        number[parameters[name]]: {slot: _plain(tensor) for slot, tensor in slots.items()}
        for name, slots in tensors.items()
    }
    optimizer.load_state_dict({**optimizer.state_dict(), "state": state})


def _plain(tensor: Tensor) -> Tensor | int:
    return int(tensor) if tensor.ndim == 0 and not tensor.is_floating_point() else tensor.clone()
