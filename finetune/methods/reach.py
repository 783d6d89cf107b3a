"""The modules and parameters that a model's forward uses: the others cannot be trained."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from torch import Tensor, nn

    from finetune.interfaces import Host


def unreached(host: Host, names: Sequence[str]) -> list[str]:
    """Return those of the modules ``names`` whose output does not change the outputs of the base.

    A zero that requires a gradient is added to the output of each module; one forward and one backward find the zeros
    without a gradient. LLaVA's last vision layer is such a module: the projector reads the layer before it.
    """
    zeros = {name: torch.zeros((), requires_grad=True) for name in names}

    def shift(name: str) -> Callable[..., Tensor]:
        def hook(module: nn.Module, args: object, output: Tensor) -> Tensor:
            return output + zeros[name].to(output.device, output.dtype)

        return hook

    handles = [host.model.get_submodule(name).register_forward_hook(shift(name)) for name in names]
    try:
        return _without_gradient(host, zeros)
    finally:
        for handle in handles:
            handle.remove()


def unreached_parameters(host: Host, parameters: Mapping[str, nn.Parameter]) -> list[str]:
    """Return the names of those frozen ``parameters`` that do not change the outputs of the base."""
    for parameter in parameters.values():
        parameter.requires_grad_(True)
    try:
        return _without_gradient(host, parameters)
    finally:
        for parameter in parameters.values():
            parameter.requires_grad_(False)


def _without_gradient(host: Host, tensors: Mapping[str, Tensor]) -> list[str]:
    known = frozenset(tensors)
    if known not in host.unused:
        with torch.enable_grad():
            outputs = host.forward().float().sum()
            found = (
                torch.autograd.grad(outputs, list(tensors.values()), allow_unused=True)
                if outputs.requires_grad
                else [None] * len(tensors)
            )
        host.unused[known] = [name for name, gradient in zip(tensors, found, strict=True) if gradient is None]
    return host.unused[known]
