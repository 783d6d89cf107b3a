"""LoRA's forward and backward in training, with the additions folded into the multiplications.

PEFT computes ``base(x) + B(A(x)) * scaling``. Beside the products, a step makes four passes over tensors as large as
the layer's input and output. Here the multiplications accumulate into their outputs, which saves these passes. The
gradients follow from section 4.1 of Hu et al., https://arxiv.org/abs/2106.09685, by the chain rule.
"""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.autograd.function import once_differentiable

from finetune.core.matmul import linear

if TYPE_CHECKING:
    from torch import Tensor


def fold_additions(layer: nn.Module) -> None:
    """Use this forward for a plain LoRA on a linear module in training; PEFT's own forward does the rest."""
    layer.forward = partial(_forward, layer)


def _forward(layer: Any, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    (name, *others) = layer.active_adapters or [None]
    if (
        not torch.is_grad_enabled()
        or torch.is_autocast_enabled(x.device.type)
        or name not in layer.lora_A
        or (others or args or kwargs or layer.disable_adapters or layer.merged or name in layer.lora_variant)
        or (layer.lora_dropout[name].training and not isinstance(layer.lora_dropout[name], nn.Identity))
    ):
        return type(layer).forward(layer, x, *args, **kwargs)
    base, down, up = layer.base_layer, layer.lora_A[name].weight, layer.lora_B[name].weight
    # PEFT's forward handles weights that are quantized, in half precision, or gathered at each call.
    if (
        type(base) is not nn.Linear
        or not base.weight.dtype == x.dtype == down.dtype
        or base.weight.ndim * down.ndim != 4
    ):
        return type(layer).forward(layer, x)
    return _Linear.apply(x, base.weight, base.bias, down, up, layer.scaling[name])


class _Linear(torch.autograd.Function):
    """x [..., I] -> x W' + b + scaling x A' B' [..., O], with gradients for x, A [r, I] and B [O, r] only."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, down: Tensor, up: Tensor, scaling: float
    ) -> Tensor:
        rows = x.reshape(-1, x.shape[-1])  # [N, I]
        inner = linear(rows, down)  # [N, r]
        out = linear(rows, weight, bias).addmm_(inner, up.T, alpha=scaling)
        ctx.save_for_backward(rows, inner, weight, down, up)
        ctx.shape, ctx.scaling = x.shape, scaling
        return out.view(*x.shape[:-1], out.shape[-1])

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        rows, inner, weight, down, up = ctx.saved_tensors
        out = gradient.reshape(-1, gradient.shape[-1])  # [N, O]
        # The small matrices get r rows, not r columns: a BLAS is two to four times slower for thin columns.
        at_inner = (out @ up.T.contiguous().T).mul_(ctx.scaling)  # [N, r]
        for_x = linear(out, weight.T).addmm_(at_inner, down).view(ctx.shape) if ctx.needs_input_grad[0] else None
        for_up = (inner.T @ out).mul_(ctx.scaling)  # [r, O]
        return for_x, None, None, at_inner.T @ rows, for_up.T.contiguous(), None
