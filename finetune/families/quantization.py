"""Quantization of a base by bitsandbytes, in 4 or 8 bit: its language tower only, by full path."""

from __future__ import annotations

from copy import copy
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from transformers import BitsAndBytesConfig

from finetune.errors import ModelError

if TYPE_CHECKING:
    from finetune.interfaces import Towers
    from finetune.recipe import Quantization


def quantization_config(quantization: Quantization, dtype: str, kept: list[str]) -> BitsAndBytesConfig:
    """Return the config with which transformers loads a quantized model.

    Args:
        quantization: ``4bit`` is NF4 with double quantization (Dettmers et al., https://arxiv.org/abs/2305.14314),
            ``8bit`` is LLM.int8() (https://arxiv.org/abs/2208.07339).
        dtype: the dtype in which quantized layers compute.
        kept: the full paths of the modules that are not quantized; a bare name such as ``visual`` would match nothing.

    Raises:
        ModelError: ``quantization`` is unknown.
    """
    if quantization not in ("4bit", "8bit"):
        raise ModelError(f"quantization must be 4bit, 8bit or None, got {quantization!r}")
    if quantization == "8bit":
        return BitsAndBytesConfig(load_in_8bit=True, llm_int8_skip_modules=kept)
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=getattr(torch, dtype),
        llm_int8_skip_modules=kept,
    )


def quantized_modules(model: nn.Module) -> list[str]:
    """Return the full names of the modules that bitsandbytes quantized."""
    return [name for name, module in model.named_modules() if is_quantized(module)]


def is_quantized(module: nn.Module) -> bool:
    """Return whether a linear module's weight is quantized."""
    weight: Any = getattr(module, "weight", None)
    return isinstance(module, nn.Linear) and type(weight).__name__ in ("Params4bit", "Int8Params")


def keep_trainable(model: nn.Module) -> None:
    """Stop 4-bit layers from repacking their weights at their first run in eval mode on some CPUs (AVX512-BF16).

    Repacked weights pass no gradient on, and differ from the base's bytes.
    """
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False  # type: ignore[assignment]


def settle_states(model: nn.Module) -> None:
    """Set up the states of 8-bit layers from their weights now, as their first forward would do."""
    for module in model.modules():
        if is_quantized(module) and getattr(module.weight, "CB", None) is not None:
            module.init_8bit_state()  # type: ignore[operator]


def states_to_share(model: nn.Module) -> dict[int, Any]:
    """Return copies of the states that bitsandbytes keeps beside its weights, for modules that share the weights.

    Args:
        model: the model, whose states are settled.

    Returns:
        Id of each state -> its copy, with the same tensors.
    """
    quantized = (module for module in model.modules() if is_quantized(module))
    kept = (value for module in quantized for value in vars(module).values())
    return {id(state): copy(state) for state in kept if type(state).__module__.startswith("bitsandbytes.")}


def check_quantized(model: nn.Module, towers: Towers) -> None:
    """Refuse a model without quantized modules, or with any outside its language tower.

    Raises:
        ModelError: bitsandbytes quantized nothing, or other towers.
    """
    names = quantized_modules(model)
    strays = [name for name in names if not name.startswith(tuple(f"{path}." for path in towers.get("language", ())))]
    if strays or not names:
        what = f"{', '.join(strays[:4])} outside it" if strays else "nothing"
        raise ModelError(
            f"only the language tower must be quantized, but bitsandbytes quantized {what}. Set quantization to null."
        )
