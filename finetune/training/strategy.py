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
        TrainingError: this recipe cannot run so; the message says why, and what to set.
    """
    kind = accelerator.distributed_type
    if os.environ.get("ACCELERATE_USE_FSDP") == "true" and kind is not DistributedType.FSDP:
        raise TrainingError(
            f"FSDP was asked for, but accelerate gives {kind.value} on {accelerator.device.type}: it has FSDP on GPUs "
            "only. Leave STRATEGY or the FSDP config out."
        )
    if kind in _PLAIN:
        return Replicated(accelerator)
    if kind is DistributedType.FSDP:
        reason = _why_not_fsdp(accelerator, recipe)
    elif kind is DistributedType.DEEPSPEED:
        reason = _why_not_deepspeed(accelerator, recipe)
    else:
        reason = "only NO, MULTI_CPU, MULTI_GPU, FSDP (version 2) and DEEPSPEED are known here. Take one of those."
    if reason:
        raise TrainingError(f"accelerate's distributed_type is {kind.value}: {reason}")
    return SplitBase(accelerator) if kind is DistributedType.FSDP else DeepSpeed(accelerator)


def _why_not_fsdp(accelerator: Accelerator, recipe: Recipe) -> str | None:
    plugin = accelerator.state.fsdp_plugin
    if plugin.fsdp_version != 2:
        return (
            f"fsdp_version {plugin.fsdp_version} would flatten adapter and base into one tensor. Set fsdp_version: 2, "
            "as recipes/accelerate/fsdp2.yaml has it."
        )
    if plugin.cpu_ram_efficient_loading:
        return "every process loads the base by itself here. Set fsdp_cpu_ram_efficient_loading: false."
    if plugin.activation_checkpointing:
        return "set train.gradient_checkpointing: true in the recipe, and fsdp_activation_checkpointing: false."
    if isinstance(plugin.cpu_offload, CPUOffloadPolicy):
        return "a base that is cut is not kept on the CPU as well. Set fsdp_offload_params: false."
    return _why_not_cut(recipe)


def _why_not_deepspeed(accelerator: Accelerator, recipe: Recipe) -> str | None:
    plugin = accelerator.state.deepspeed_plugin
    for key in ("optimizer", "scheduler"):
        if key in plugin.deepspeed_config:
            return f"the recipe says what the {key} is. Take {key!r} out of the DeepSpeed config."
    if plugin.zero_stage not in (1, 2, 3):
        return f"zero_stage {plugin.zero_stage} shares nothing out. Set 2 or 3, or use recipes/accelerate/ddp.yaml."
    if getattr(recipe.data, "streaming", False):
        return (
            "there either every row has an image or none has, and rows of a stream are not known beforehand. Set "
            "data.streaming: false, or use recipes/accelerate/ddp.yaml or fsdp2.yaml."
        )
    if plugin.zero_stage < 3:
        return None
    if any(section.couples_rows for section in recipe.objectives):
        return "the contrastive loss reads a weight of the base outside of its forward, where ZeRO-3 has cut it. Set 2."
    if whole := [section.name for section in recipe.parts if section.replaces_parameters]:
        return (
            f"{' and '.join(whole)} put whole parameters in the places of the base's own, which ZeRO-3 has cut. Use "
            "recipes/accelerate/ddp.yaml or fsdp2.yaml, or another method."
        )
    return _why_not_cut(recipe)


def _why_not_cut(recipe: Recipe) -> str | None:
    """Return the reason why the base of a recipe cannot be cut over processes; None where it can."""
    if recipe.model.quantization:
        return f"a base held in {recipe.model.quantization} cannot be cut. Leave out model.quantization, or use DDP."
    if any(isinstance(section, LoraSection) and section.use_dora for section in recipe.parts):
        return "DoRA reads whole weights, which no process has. Set use_dora: false, or use DDP."
    return None
