"""The content of ``adapter_config.json``, a function of the manifest's description, so the two cannot differ."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from finetune.errors import ManifestError
from finetune.tables import FIXED_PEFT_CONFIG, LORA_OPTIONS, PEFT_PROMPTS

if TYPE_CHECKING:
    from finetune.adapters.manifest import AdapterDescription, PartDescription

# For adapters that PEFT would load incorrectly: PEFT refuses an unknown peft_type by name.
OURS = "FINETUNE_VLM"


def peft_type(methods: list[str], *, model_type: str) -> str:
    """Return the ``peft_type`` of an adapter: PEFT's own if PEFT loads the adapter and gives the same logits."""
    if methods == ["lora"]:
        return "LORA"
    if methods == ["prompt_tuning"] and model_type in PEFT_PROMPTS:
        return "PROMPT_TUNING"
    return OURS


def peft_config(description: AdapterDescription) -> dict[str, Any]:
    """Return PEFT's fields, with full module names and no field that changes a base.

    Raises:
        ManifestError: ``peft_type`` or the options do not fit the methods.
    """
    if description.peft_type == OURS:
        parts = [{"method": part.method, **part.options} for part in description.parts]
        return {"peft_type": OURS, "parts": parts, "how_to_load": "finetune.load(...), of the package finetune-vlm"}
    if len(description.parts) != 1:
        raise ManifestError(
            f"peft_type must be {OURS!r} for an adapter of {description.methods}, got {description.peft_type!r}"
        )
    part = description.parts[0]
    own = _prompt(part) if part.method == "prompt_tuning" else _lora(part)
    return {"peft_type": description.peft_type, "base_model_name_or_path": None, "inference_mode": True, **own}


def _lora(part: PartDescription) -> dict[str, Any]:
    if set(part.options) != LORA_OPTIONS:
        wrong = sorted(set(part.options) ^ LORA_OPTIONS)
        raise ManifestError(
            f"the options of a LoRA adapter must be {', '.join(sorted(LORA_OPTIONS))}; missing or unknown: "
            f"{', '.join(wrong[:5])}"
        )
    return {**part.options, "target_modules": part.names, **FIXED_PEFT_CONFIG}


def _prompt(part: PartDescription) -> dict[str, Any]:
    return {
        "task_type": "CAUSAL_LM",
        "num_virtual_tokens": part.options["num_virtual_tokens"],
        "token_dim": part.options["token_dim"],
        "num_transformer_submodules": 1,
        "prompt_tuning_init": "RANDOM",
    }
