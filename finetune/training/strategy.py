"""The strategy by which the processes of a run share its work, chosen by the accelerate config."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

from accelerate.utils import DistributedType
from torch.distributed.fsdp import CPUOffloadPolicy

from finetune.errors import TrainingError
from finetune.recipe import LoraSection
from finetune.training.deepspeed import DeepSpeed
from finetune.training.fsdp2 import SplitBase
from finetune.training.replicated import Replicated

if TYPE_CHECKING:
    from accelerate import Accelerator

    from finetune.recipe import Recipe

_PLAIN = (DistributedType.NO, DistributedType.MULTI_CPU, DistributedType.MULTI_GPU)


def strategy_of(accelerator: Accelerator, recipe: Recipe) -> Replicated:
    """Return the strategy of a run.

    Raises:
        TrainingError: the recipe cannot run with this accelerate config; the message has the reason and what to set.
    """
    kind = accelerator.distributed_type
    if os.environ.get("ACCELERATE_USE_FSDP") == "true" and kind is not DistributedType.FSDP:
        raise TrainingError(
            f"FSDP needs GPUs, but accelerate gives {kind.value} on {accelerator.device.type}. Remove STRATEGY or the "
            "FSDP config."
        )
    if kind in _PLAIN:
        return Replicated(accelerator)
    if kind is DistributedType.FSDP:
        reason = _why_not_fsdp(accelerator, recipe)
    elif kind is DistributedType.DEEPSPEED:
        reason = _why_not_deepspeed(accelerator, recipe)
    else:
        reason = "it must be NO, MULTI_CPU, MULTI_GPU, FSDP (version 2) or DEEPSPEED. Use one of these."
    if reason:
        raise TrainingError(f"accelerate's distributed_type is {kind.value}: {reason}")
    return SplitBase(accelerator) if kind is DistributedType.FSDP else DeepSpeed(accelerator)


def _why_not_fsdp(accelerator: Accelerator, recipe: Recipe) -> str | None:
    plugin = accelerator.state.fsdp_plugin
    if plugin.fsdp_version != 2:
        return (
            f"fsdp_version must be 2, got {plugin.fsdp_version}, which would flatten adapter and base into one tensor. "
            "Set fsdp_version: 2, as in recipes/accelerate/fsdp2.yaml."
        )
    if plugin.cpu_ram_efficient_loading:
        return (
            "fsdp_cpu_ram_efficient_loading must be false, because every process loads the base by itself. Set "
            "fsdp_cpu_ram_efficient_loading: false."
        )
    if plugin.activation_checkpointing:
        return (
            "fsdp_activation_checkpointing must be false, because the recipe has its own. Set "
            "fsdp_activation_checkpointing: false, and train.gradient_checkpointing: true in the recipe."
        )
    if isinstance(plugin.cpu_offload, CPUOffloadPolicy):
        return (
            "fsdp_offload_params must be false, because a sharded base is not offloaded to the CPU. Set "
            "fsdp_offload_params: false."
        )
    return _why_not_sharded(recipe)


def _why_not_deepspeed(accelerator: Accelerator, recipe: Recipe) -> str | None:
    plugin = accelerator.state.deepspeed_plugin
    for key in ("optimizer", "scheduler"):
        if key in plugin.deepspeed_config:
            return f"the DeepSpeed config must not set {key!r}, because the recipe sets the {key}. Remove it there."
    if plugin.zero_stage not in (1, 2, 3):
        return (
            f"zero_stage must be 1, 2 or 3, got {plugin.zero_stage}, which shards nothing. Set 2 or 3, or use "
            "recipes/accelerate/ddp.yaml."
        )
    if getattr(recipe.data, "streaming", False):
        return (
            "data.streaming must be false. DeepSpeed needs an image in all rows or in none, and the rows of a stream "
            "are unknown before training. Set data.streaming: false, or use recipes/accelerate/ddp.yaml or fsdp2.yaml."
        )
    if plugin.zero_stage < 3:
        return None
    if any(section.couples_rows for section in recipe.objectives):
        return (
            "zero_stage must be 1 or 2 for the contrastive loss, got 3: the loss reads a weight of the base outside "
            "its forward, where ZeRO-3 shards it. Set zero_stage: 2."
        )
    if whole := [section.name for section in recipe.parts if section.replaces_parameters]:
        return (
            f"zero_stage 3 cannot be used with {' and '.join(whole)}, which replaces whole parameters of the base: "
            "ZeRO-3 shards them. Use recipes/accelerate/ddp.yaml or fsdp2.yaml, or another method."
        )
    return _why_not_sharded(recipe)


def _why_not_sharded(recipe: Recipe) -> str | None:
    """Return the reason why the base of a recipe cannot be sharded over processes; None if it can."""
    if recipe.model.quantization:
        return f"a {recipe.model.quantization} base cannot be sharded. Remove model.quantization, or use DDP."
    if any(isinstance(section, LoraSection) and section.use_dora for section in recipe.parts):
        return "DoRA needs whole weights, but each process has only a part of them. Set use_dora: false, or use DDP."
    return None
