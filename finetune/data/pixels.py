"""Pixels that an app has in memory, as numpy or torch keep them, brought into one form."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

import numpy as np

from finetune.errors import DataError

if TYPE_CHECKING:
    import torch
    from typing_extensions import TypeIs


def is_array(image: object) -> bool:
    """Return whether an image came as an array of numpy or torch."""
    return isinstance(image, np.ndarray) or _is_tensor(image)


def pixels_of(image: np.ndarray | torch.Tensor) -> np.ndarray:
    """Return pixels [H, W, 3] uint8.

    Args:
        image: RGB, [H, W, 3] or [3, H, W]: uint8, or floating-point numbers from 0, black, to 1.

    Raises:
        DataError: it has another shape, or one that reads both ways, or other values.
    """
    where = f"an array {list(image.shape)} of {str(image.dtype).removeprefix('torch.')}"
    if _is_tensor(image):
        tensor = image.detach().cpu()
        pixels = (tensor.float() if str(tensor.dtype) == "torch.bfloat16" else tensor).numpy()
    else:
        pixels = image
    if pixels.ndim != 3 or 3 not in (pixels.shape[0], pixels.shape[2]) or 0 in pixels.shape:
        raise DataError(f"{where} is not one RGB image: that has the shape [H, W, 3] or [3, H, W]")
    if pixels.shape[0] == pixels.shape[2]:
        raise DataError(f"{where} can be read as [H, W, 3] and as [3, H, W]. Give a PIL image: Image.fromarray(pixels)")
    if pixels.shape[0] == 3:
        pixels = pixels.transpose(1, 2, 0)
    if np.issubdtype(pixels.dtype, np.floating):
        low, high = pixels.min(), pixels.max()
        if not (low >= 0 and high <= 1):  # nor where one of them is not a number
            raise DataError(
                f"{where} has values from {low:g} to {high:g}; floating-point pixels go from 0 to 1, as they are "
                "before a processor normalises them. Divide by 255, or give uint8."
            )
        pixels = (pixels.astype(np.float64) * 255).round().astype(np.uint8)
    if pixels.dtype != np.uint8:
        raise DataError(f"{where} is no image: pixels are uint8, or floating-point numbers from 0 to 1")
    return np.ascontiguousarray(pixels)


def _is_tensor(image: object) -> TypeIs[torch.Tensor]:
    # Who has a tensor has imported torch; who has none need not wait for it.
    torch = sys.modules.get("torch")
    return torch is not None and isinstance(image, torch.Tensor)
