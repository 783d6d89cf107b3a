"""Gradient checkpointing: a layer's activations are computed again in the backward pass instead of being kept.

Transformers' own switch asks for a module in training mode, and every frozen module here is in eval mode: it would do
nothing. What is recomputed is what it calls a ``GradientCheckpointingLayer``, in every tower.
"""

from __future__ import annotations

from contextlib import contextmanager, nullcontext
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch.utils.checkpoint import checkpoint
from transformers.modeling_layers import GradientCheckpointingLayer

from finetune.errors import TrainingError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from torch import nn


@contextmanager
def recomputing(model: nn.Module, *, enabled: bool = True) -> Iterator[None]:
    """Have every layer of ``model`` recomputed in the backward pass, while entered.

    Forwards without a graph, as of generation, run as ever. The generators are as they were in the first forward, so
    dropout draws the same.

    Args:
        model: the plain model; it may be wrapped for several processes.
        enabled: False changes nothing.

    Raises:
        TrainingError: the model has no such layer.
    """
    layers = [m for m in model.modules() if isinstance(m, GradientCheckpointingLayer)] if enabled else []
    if enabled and not layers:
        raise TrainingError(
            f"train.gradient_checkpointing: {type(model).__name__} has no layer that transformers could recompute. "
            "Set it to false."
        )
    for layer in layers:
        # The forward of the instance, not its call: hooks, as those that gather a layer's weights, stay outside.
        layer.forward = partial(_recomputed, layer, layer.forward)
    try:
        yield
    finally:
        for layer in layers:
            del layer.forward  # the class's own is there again


def _recomputed(layer: nn.Module, forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    if not torch.is_grad_enabled():
        return forward(*args, **kwargs)
    hooks = [(module, module._forward_pre_hooks.copy(), module._forward_hooks.copy()) for module in layer.modules()]
    return checkpoint(forward, *args, use_reentrant=False, context_fn=lambda: (nullcontext(), _hooked(hooks)), **kwargs)


@contextmanager
def _hooked(hooks: Sequence[tuple[nn.Module, Any, Any]]) -> Iterator[None]:
    """Have modules run with the hooks that they had in the first forward, some of which were for that one alone."""
    now = [(module, module._forward_pre_hooks, module._forward_hooks) for module, _, _ in hooks]
    try:
        _set_hooks(hooks)
        yield
    finally:
        _set_hooks(now)


def _set_hooks(hooks: Sequence[tuple[nn.Module, Any, Any]]) -> None:
    for module, before, after in hooks:
        module._forward_pre_hooks, module._forward_hooks = before, after
