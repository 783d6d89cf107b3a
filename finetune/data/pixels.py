"""Pixels in the memory of an app, as arrays of numpy or torch, converted to one form."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

import numpy as np

from finetune.errors import DataError

if TYPE_CHECKING:
    import torch
    from typing_extensions import TypeIs


def is_array(image: object) -> bool:
    """Return whether an image is an array of numpy or torch."""
    return isinstance(image, np.ndarray) or _is_tensor(image)


def pixels_of(image: np.ndarray | torch.Tensor) -> np.ndarray:
    """Return pixels [H, W, 3] uint8.

    Args:
        image: the RGB array, [H, W, 3] or [3, H, W]: uint8, or floating-point numbers from 0 (black) to 1.

    Raises:
        DataError: if the shape is another one or fits both layouts, or the values are of another type or range.
    """
    found = f"an array {list(image.shape)} of {str(image.dtype).removeprefix('torch.')}"
    if _is_tensor(image):
        tensor = image.detach().cpu()
        pixels = (tensor.float() if str(tensor.dtype) == "torch.bfloat16" else tensor).numpy()
    else:
        pixels = image
    if pixels.ndim != 3 or 3 not in (pixels.shape[0], pixels.shape[2]) or 0 in pixels.shape:
        raise DataError(
            f"an RGB image must have the shape [H, W, 3] or [3, H, W], got {found}. Give one image, without a batch "
            "dimension."
        )
    if pixels.shape[0] == pixels.shape[2]:
        raise DataError(
            f"an RGB image must have 3 channels in one place, got {found}, which fits both [H, W, 3] and [3, H, W]. "
            "Give a PIL image: Image.fromarray(pixels)"
        )
    if pixels.shape[0] == 3:
        pixels = pixels.transpose(1, 2, 0)
    if np.issubdtype(pixels.dtype, np.floating):
        low, high = pixels.min(), pixels.max()
        if not (low >= 0 and high <= 1):  # also true if one of them is not a number
            raise DataError(
                f"floating-point pixels must be from 0 to 1, got {found} with values from {low:g} to {high:g}. Divide "
                "them by 255, or give uint8; give pixels before a processor normalises them."
            )
        pixels = (pixels.astype(np.float64) * 255).round().astype(np.uint8)
    if pixels.dtype != np.uint8:
        raise DataError(
            f"pixels must be uint8, or floating-point numbers from 0 to 1, got {found}. Convert them to uint8."
        )
    return np.ascontiguousarray(pixels)


def _is_tensor(image: object) -> TypeIs[torch.Tensor]:
    # A caller with a tensor has imported torch already; other callers need not wait for the import.
    torch = sys.modules.get("torch")
    return torch is not None and isinstance(image, torch.Tensor)
