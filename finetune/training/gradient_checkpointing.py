"""Gradient checkpointing: a layer's activations are computed again in the backward pass instead of being kept.

Transformers' own switch needs modules in training mode. Every frozen module here is in eval mode, so the switch would
do nothing. This file recomputes every ``GradientCheckpointingLayer`` of transformers, in all towers.
"""

from __future__ import annotations

from contextlib import contextmanager, nullcontext
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch.utils.checkpoint import checkpoint
from transformers.modeling_layers import GradientCheckpointingLayer

from finetune.errors import TrainingError
from finetune.training.replay import replays

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from torch import nn


@contextmanager
def recomputing(model: nn.Module, *, enabled: bool = True) -> Iterator[None]:
    """Recompute every layer of ``model`` in the backward pass, inside the ``with`` block.

    A forward without a graph, as in generation, runs unchanged. The recomputation starts from the first forward's
    random state, so dropout draws the same values.

    Args:
        model: the plain model; the loop may run it wrapped for several processes.
        enabled: False changes nothing.

    Raises:
        TrainingError: the model has no layer that can be recomputed.
    """
    layers = [m for m in model.modules() if isinstance(m, GradientCheckpointingLayer)] if enabled else []
    if enabled and not layers:
        raise TrainingError(
            "train.gradient_checkpointing needs a layer that transformers can recompute, and "
            f"{type(model).__name__} has none. Set it to false."
        )
    # A layer that replays stored outputs has nothing to recompute.
    layers = [layer for layer in layers if not replays(layer)]
    for layer in layers:
        # Replace the forward, not the call: hooks, such as those that gather a layer's weights, stay outside.
        layer.forward = partial(_recomputed, layer, layer.forward)
    try:
        yield
    finally:
        for layer in layers:
            del layer.forward  # the forward of the class is used again


def _recomputed(layer: nn.Module, forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    if not torch.is_grad_enabled():
        return forward(*args, **kwargs)
    hooks = [(module, module._forward_pre_hooks.copy(), module._forward_hooks.copy()) for module in layer.modules()]
    return checkpoint(forward, *args, use_reentrant=False, context_fn=lambda: (nullcontext(), _hooked(hooks)), **kwargs)


@contextmanager
def _hooked(hooks: Sequence[tuple[nn.Module, Any, Any]]) -> Iterator[None]:
    """Run modules with the hooks of the first forward, some of which existed only during that forward."""
    now = [(module, module._forward_pre_hooks, module._forward_hooks) for module, _, _ in hooks]
    try:
        _set_hooks(hooks)
        yield
    finally:
        _set_hooks(now)


def _set_hooks(hooks: Sequence[tuple[nn.Module, Any, Any]]) -> None:
    for module, before, after in hooks:
        module._forward_pre_hooks, module._forward_hooks = before, after
