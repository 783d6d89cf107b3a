"""The choice of a base's attention implementation."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from transformers.utils import is_flash_attn_2_available

from finetune.errors import ModelError

if TYPE_CHECKING:
    from collections.abc import Callable

    from transformers import PreTrainedModel


def load_with_attention(
    load: Callable[..., PreTrainedModel], wanted: str, name_or_path: str, *, device: str
) -> PreTrainedModel:
    """Load a model with the wanted attention in its language tower, and in every other tower that supports it.

    Args:
        load: the function that loads the model, with the argument ``attn_implementation`` of transformers.
        wanted: the name of the implementation; ``auto`` leaves the choice to transformers.
        name_or_path: the name of the model in errors.
        device: the device for the model.

    Raises:
        ModelError: the implementation is not available here, or the language tower does not support it.
    """
    if wanted == "auto":
        return load()
    if wanted == "flash_attention_2" and (torch.device(device).type != "cuda" or not is_flash_attn_2_available()):
        # transformers would download a kernel from the hub, or fail at the first forward.
        raise ModelError(
            f"{name_or_path}: model.attn_implementation {wanted} needs the package flash-attn and a CUDA device, got "
            f"device {device}. Install it, or set auto or sdpa."
        )
    whole: Any = wanted
    for attention in (whole, {"text_config": wanted}):
        try:
            return load(attn_implementation=attention)
        except ValueError as error:
            if "attention" not in str(error):
                raise
            reason = str(error).strip().splitlines()[0]
    raise ModelError(
        f"{name_or_path}: model.attn_implementation must be one that the model supports, got {wanted}: "
        f"{reason} Set auto."
    )
