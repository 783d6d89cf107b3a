"""Linear modules of a frozen base on a CPU, by the faster of torch's two libraries.

For float32 torch calls Intel's MKL, which uses AVX-512 on Intel's CPUs only: on an AMD that has it, it runs at half
the rate of oneDNN, which torch holds too and calls for other dtypes and in compiled code. ``python -m
benchmarks.matmul`` measures both.
"""

from __future__ import annotations

import platform
from contextvars import ContextVar
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad

if TYPE_CHECKING:
    from collections.abc import Iterable

FEW_ROWS = ContextVar("finetune_few_rows", default=False)  # set where each product is of one token a row of a batch
SMALL_WEIGHT = 2**17  # values; a call of oneDNN takes 15 us more than one of MKL, as long as a product of few rows
MIN_ROWS = 2  # one row runs another kernel, which rounds differently; from two rows on each row is the same


def onednn_is_faster() -> bool:
    """Return whether MKL leaves AVX-512 unused on this CPU, and torch was built with oneDNN."""
    return (
        torch.backends.mkldnn.is_available()
        and hasattr(torch.ops.mkldnn, "_linear_pointwise")
        and torch.backends.cpu.get_cpu_capability() == "AVX512"
        and "AuthenticAMD" in _vendor()
    )


def _vendor() -> str:
    try:
        return Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").partition("\n\n")[0]
    except OSError:
        return platform.processor()  # names the vendor on Windows


ONEDNN_IS_FASTER = onednn_is_faster()  # a constant, because every product reads it


def linear(rows: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """Return ``rows`` [N, I] times the transposed ``weight`` [O, I], plus ``bias`` [O]; the product has no gradient."""
    if not _by_onednn(rows, weight):
        return nn.functional.linear(rows, weight, bias)
    product: Tensor = torch.ops.mkldnn._linear_pointwise(rows, weight, bias, "none", [], "")
    return product


def speed_up(modules: Iterable[nn.Module]) -> None:
    """Let oneDNN compute the linear modules of a base where that is faster; modules that train keep their forward."""
    if not ONEDNN_IS_FASTER:
        return
    for module in modules:
        if type(module) is nn.Linear and module.weight.device.type == "cpu" and module.weight.dtype == torch.float32:
            vars(module)["forward"] = partial(_forward, module)


def _by_onednn(rows: Tensor, weight: Tensor) -> bool:
    return (
        ONEDNN_IS_FASTER
        and not _is_followed()
        and len(rows) >= MIN_ROWS
        and rows.device.type == "cpu"
        and rows.dtype == weight.dtype == torch.float32
    )


def _is_followed() -> bool:
    """Return whether a compiler, a tracer or forward-mode autograd records: these support torch's product only."""
    return torch.compiler.is_compiling() or torch.jit.is_tracing() or forward_ad._current_level >= 0


def _forward(module: nn.Linear, x: Tensor) -> Tensor:
    weight, bias = module.weight, module.bias
    if (
        _is_followed()
        or x.numel() < MIN_ROWS * x.shape[-1]
        or (weight.numel() <= SMALL_WEIGHT and FEW_ROWS.get())
        or (torch.is_grad_enabled() and (weight.requires_grad or (bias is not None and bias.requires_grad)))
        or type(weight) not in (nn.Parameter, Tensor)  # a weight that is sharded over processes
        or torch.is_autocast_enabled("cpu")
    ):
        return nn.functional.linear(x, weight, bias)
    if torch.is_grad_enabled() and x.requires_grad:
        return _Frozen.apply(x, weight, bias)
    return _of_each_row(x, weight, bias)


def _of_each_row(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    return linear(x.reshape(-1, x.shape[-1]), weight, bias).view(*x.shape[:-1], len(weight))


class _Frozen(torch.autograd.Function):
    """x [..., I] -> x W' + b [..., O], with a gradient for x only."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return _of_each_row(x, weight, bias)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        ctx.save_for_backward(inputs[1])

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        (weight,) = ctx.saved_tensors
        if torch.is_grad_enabled():  # for a gradient of the gradient
            return nn.functional.linear(gradient, weight.T), None, None
        return _of_each_row(gradient, weight.T), None, None
