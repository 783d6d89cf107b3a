"""The rules of vLLM for adapters, from its own sources, and the format of an adapter for it.

The rules are those of vLLM 0.33.0; each names its source file, and ``tests/vllm`` compares them with the real code.
Nothing here imports PEFT or transformers, because the plugin checks every served adapter by these rules in vLLM's
environment.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from finetune.adapters.peft_format import peft_config
from finetune.errors import ExportError, brief
from finetune.export.scaling import bake_scaling
from finetune.methods.lora_options import check_options
from finetune.recipe import PromptSection

if TYPE_CHECKING:
    from torch import Tensor

    from finetune.adapters.folder import AdapterFolder
    from finetune.adapters.manifest import AdapterManifest, PartDescription

VERSION = "0.33.0"
MAX_LORA_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)  # of --max-lora-rank: config/lora.py, MaxLoRARanks
DEFAULT_MAX_LORA_RANK = 16

# model_type -> the path of its decoder's layers in transformers. vLLM has other names, and its class for each
# model_type takes these names too (hf_to_vllm_mapper in model_executor/models/*.py; fast_vlm runs on transformers' own
# modules, models/transformers/base.py). So the export changes no name.
LAYERS = {
    "fast_vlm": "model.language_model.layers.",
    "gemma3": "model.language_model.layers.",
    "idefics3": "model.text_model.layers.",
    "internvl": "model.language_model.layers.",
    "llava": "model.language_model.layers.",
    "paligemma": "model.language_model.layers.",
    "qwen2_5_vl": "model.language_model.layers.",
    "qwen3_vl": "model.language_model.layers.",
    "smolvlm": "model.text_model.layers.",
}
# Their classes lack the interface SupportsLoRA, and vLLM does not start on them with --enable-lora (config/lora.py,
# verify_with_model_config).
WITHOUT_LORA = ("clip", "llava_onevision")
# What vLLM packs into qkv_proj, o_proj, gate_up_proj and down_proj of a decoder's layer (packed_modules_mapping). An
# ending that no module has is an error there (lora/lora_model.py, check_unexpected_modules). vLLM drops an ending that
# only a tower has, or one outside the layers, without an error (lora/model_manager.py, activate_adapter).
PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")

_MERGE = "merge the adapter into its base: finetune export --to merged."


def refuse_for_vllm(manifest: AdapterManifest, *, max_lora_rank: int) -> None:
    """Check that vLLM serves a whole adapter, unchanged.

    Args:
        manifest: the manifest of the adapter.
        max_lora_rank: the ``--max-lora-rank`` of vLLM.

    Raises:
        ExportError: vLLM does not serve the adapter; with the reason and another way.
        ManifestError: the options of the adapter are not valid.
    """
    reason = (
        _no_limit(max_lora_rank)
        or _no_lora(manifest)
        or _other_modules(manifest)
        or _rank_over(manifest.adapter.parts[0], max_lora_rank)
    )
    if reason:
        raise ExportError(f"{manifest.full_name} cannot be served by vLLM: {reason}")


def vllm_form(adapter: AdapterFolder) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Return tensors and config, in PEFT's format, of an adapter for vLLM.

    B contains the scaling, and all modules have one rank, so the factor of vLLM is one.
    """
    return bake_scaling(adapter.tensors, peft_config(adapter.manifest.adapter))


def _no_limit(max_lora_rank: int) -> str:
    if max_lora_rank in MAX_LORA_RANKS:
        return ""
    return f"--max-lora-rank must be one of {', '.join(map(str, MAX_LORA_RANKS))}, got {max_lora_rank}."


def _no_lora(manifest: AdapterManifest) -> str:
    """Return the reason if the adapter is no plain LoRA, or its base takes no LoRA; else an empty text.

    See lora/peft_helper.py, ``_validate_features``. No manifest has biases or ``modules_to_save``, see
    ``tables.FIXED_PEFT_CONFIG``.
    """
    adapter, model_type = manifest.adapter, manifest.base.model_type
    if [part.method for part in adapter.parts] != ["lora"]:
        return f"it serves only LoRA, got {adapter.methods}. Load it with finetune.load(...)."
    check_options(adapter.parts[0].options, adapter.parts[0].names)
    if model_type in WITHOUT_LORA:
        return f"it supports no LoRA on {model_type}. Instead, {_MERGE}"
    if model_type not in LAYERS:
        return f"LoRA was tested there on {', '.join(LAYERS)}, got {model_type}. Instead, {_MERGE}"
    if not isinstance(manifest.task, PromptSection):
        return f"it serves only tasks that generate text, got {manifest.task.name}. Load it with finetune.load(...)."
    if adapter.parts[0].options["use_dora"]:
        return f"it supports no DoRA. Train with method.use_dora: false, or {_MERGE}"
    return ""


def _other_modules(manifest: AdapterManifest) -> str:
    (part,) = manifest.adapter.parts
    layers = LAYERS[manifest.base.model_type]
    other = [name for name in part.names if not name.startswith(layers) or name.rpartition(".")[2] not in PROJECTIONS]
    if not other:
        return ""
    return (
        f"it would refuse or ignore {len(other)} of the {len(part.names)} modules that the adapter changes, such as "
        f"{brief(other[0])}. It serves {', '.join(PROJECTIONS)} below {layers.removesuffix('.')}. Train with "
        f"method.towers: {{projector: none, vision: none}}, or {_MERGE}"
    )


def _rank_over(part: PartDescription, limit: int) -> str:
    """Return the reason if a rank is over the limit (lora/peft_helper.py, validate_legal), else an empty text."""
    rank = max((part.options["rank_pattern"].get(name, part.options["r"]) for name in part.names), default=0)
    if rank <= limit:
        return ""
    enough = [allowed for allowed in MAX_LORA_RANKS if allowed >= rank]
    instead = (
        f"Set --max-lora-rank {enough[0]}, in vLLM and here."
        if enough
        else f"vLLM has no larger one. Instead, {_MERGE}"
    )
    return f"the adapter's ranks must be at most --max-lora-rank {limit}, got {rank}. {instead}"
