"""The modules and parameters that a model's forward uses: the others cannot be trained."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from torch import Tensor, nn


def unreached(model: nn.Module, names: Sequence[str], forward: Callable[[], Tensor]) -> list[str]:
    """Return those of the modules ``names`` whose output does not change the result of ``forward``.

    A zero that requires a gradient is added to the output of each module; one forward and one backward find the zeros
    without a gradient. LLaVA's last vision layer is such a module: the projector reads the layer before it.
    """
    zeros = {name: torch.zeros((), requires_grad=True) for name in names}

    def shift(name: str) -> Callable[..., Tensor]:
        def hook(module: nn.Module, args: object, output: Tensor) -> Tensor:
            return output + zeros[name].to(output.device, output.dtype)

        return hook

    handles = [model.get_submodule(name).register_forward_hook(shift(name)) for name in names]
    try:
        return _without_gradient(zeros, forward)
    finally:
        for handle in handles:
            handle.remove()


def unreached_parameters(parameters: Mapping[str, nn.Parameter], forward: Callable[[], Tensor]) -> list[str]:
    """Return the names of those frozen ``parameters`` that do not change the result of ``forward``."""
    for parameter in parameters.values():
        parameter.requires_grad_(True)
    try:
        return _without_gradient(parameters, forward)
    finally:
        for parameter in parameters.values():
            parameter.requires_grad_(False)


def _without_gradient(tensors: Mapping[str, Tensor], forward: Callable[[], Tensor]) -> list[str]:
    with torch.enable_grad():
        found = torch.autograd.grad(forward().float().sum(), list(tensors.values()), allow_unused=True)
    return [name for name, gradient in zip(tensors, found, strict=True) if gradient is None]
