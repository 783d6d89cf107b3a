"""The update of a finished LoRA for a linear module, equal to PEFT's layers bit for bit, and its merging."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch.nn.functional import linear

from finetune.errors import MethodError

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import Tensor, nn


class LoraUpdate:
    """``inner(x) + B(A(x)) * scaling``, in the adapter's dtype and then in that of the base.

    Args:
        module: the base's own linear module, plain or quantized.
        down: A, [r, I].
        up: B, [O, r].
        scaling: the factor of the product of A and B.
    """

    def __init__(self, module: nn.Module, down: Tensor, up: Tensor, scaling: float):
        self.module, self.down, self.up, self.scaling = module, down, up, scaling
        # PEFT rounds before the addition if the base is quantized, and after it otherwise.
        self.rounds_first = is_quantized(module)

    @property
    def num_bytes(self) -> int:
        """Bytes of the tensors that the update holds beside the base."""
        return self.down.nbytes + self.up.nbytes

    def __call__(self, inner: Callable[..., Tensor], x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Return [..., O] for x [..., I]."""
        result = inner(x, *args, **kwargs)
        added = linear(linear(x.to(self.down.dtype), self.down), self.up) * self.scaling
        if self.rounds_first:
            return result + added.to(result.dtype)
        return (result + added).to(result.dtype)

    def merging(self, name: str) -> Callable[[], None]:
        """Return the function that adds the update to the weight, in the weight's dtype.

        Raises:
            MethodError: the weight is quantized; another rounding of the sum would change every answer a little.
        """
        if is_quantized(self.module):
            raise MethodError(
                f"an adapter must be merged into a 16 or 32 bit base, but {name} is quantized. Load the base without "
                "quantization."
            )
        weight: Any = self.module.weight
        return lambda: weight.copy_(self._merged(weight.to(self.up.dtype)))

    def _merged(self, weight: Tensor) -> Tensor:
        return weight + (self.up @ self.down) * self.scaling


class DoraUpdate(LoraUpdate):
    """LoRA that changes the direction of each row of the weight, with the length of the row trained separately.

    Source: section 4.3 of Liu et al., https://arxiv.org/abs/2402.09353.

    Args:
        module: the base's own linear module, not in 8 bit.
        down: A, [r, I].
        up: B, [O, r].
        scaling: the factor of the product of A and B.
        magnitude: the lengths of the rows of the weight, [O].
    """

    def __init__(self, module: nn.Module, down: Tensor, up: Tensor, scaling: float, magnitude: Tensor):
        super().__init__(module, down, up, scaling)
        self.magnitude = magnitude
        self.bias: Any = module.bias
        # PEFT computes this at every call. The base does not change, so once is enough, by the same operations.
        weight = _dequantized(module).to(down.dtype)
        eye = torch.eye(down.shape[1], device=down.device, dtype=down.dtype)
        change = linear(linear(eye, down), up).T  # [O, I]
        norm = torch.linalg.norm(weight + scaling * change, dim=1)
        self.factor = (magnitude / norm).view(1, -1)  # [1, O]

    @property
    def num_bytes(self) -> int:
        """Bytes of the tensors that the update holds beside the base."""
        return super().num_bytes + self.magnitude.nbytes + self.factor.nbytes

    def __call__(self, inner: Callable[..., Tensor], x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Return [..., O] for x [..., I]."""
        result = inner(x, *args, **kwargs)
        turned = linear(linear(x.to(self.down.dtype), self.down), self.up)
        plain = result if self.bias is None else result - self.bias
        return (result + ((self.factor - 1) * plain + self.factor * turned * self.scaling)).to(result.dtype)

    def _merged(self, weight: Tensor) -> Tensor:
        return self.factor.view(-1, 1) * super()._merged(weight)


def is_quantized(module: nn.Module) -> bool:
    """Return whether a module's weight is held in 4 or 8 bit."""
    weight: Any = module.weight
    return not weight.is_floating_point()


def _dequantized(module: Any) -> Tensor:
    """Return the weight of a module in floating point; PEFT refuses DoRA on 8 bit as we do, so 4 bit remain."""
    if not is_quantized(module):
        return module.weight
    from bitsandbytes.functional import dequantize_4bit  # loaded already, with the quantized base

    return dequantize_4bit(module.weight.data, module.weight.quant_state)
