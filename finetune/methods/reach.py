"""Which modules the forward of a model really uses: a module that no output depends on can learn nothing."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from torch import Tensor, nn


def unreached(model: nn.Module, names: Sequence[str], forward: Callable[[], Tensor]) -> list[str]:
    """Returns those of the modules ``names`` that nothing which ``forward`` returns depends on.

    Each module's output is shifted by a zero of its own that asks for a gradient; one forward and one backward tell
    which zeros mattered. LLaVA's last vision layer is such a module: the projector reads the one before it.
    """
    zeros = {name: torch.zeros((), requires_grad=True) for name in names}

    def shift(name: str) -> Callable[..., Tensor]:
        def hook(module: nn.Module, args: object, output: Tensor) -> Tensor:
            return output + zeros[name].to(output.device, output.dtype)

        return hook

    handles = [model.get_submodule(name).register_forward_hook(shift(name)) for name in names]
    try:
        with torch.enable_grad():
            found = torch.autograd.grad(forward().float().sum(), list(zeros.values()), allow_unused=True)
    finally:
        for handle in handles:
            handle.remove()
    return [name for name, gradient in zip(names, found, strict=True) if gradient is None]
