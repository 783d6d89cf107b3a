"""Tensors from the bytes of a safetensors file, with one copy for all tensors."""

from __future__ import annotations

from itertools import groupby
from math import prod
from typing import TYPE_CHECKING

import numpy as np
import torch

from finetune.errors import IntegrityError

if TYPE_CHECKING:
    from collections.abc import Mapping

    from torch import Tensor

    from finetune.adapters.manifest import TensorEntry

DTYPES = {torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16"}
_TORCH = {name: dtype for dtype, name in DTYPES.items()}
# Bytes, as torch aligns its own tensors. Some matrix products round differently for weights with another alignment.
_ALIGNMENT = 64
_PART = 2**20  # values


def tensors_of(
    data: bytes,
    table: Mapping[str, TensorEntry],
    offsets: Mapping[str, int],
    *,
    source: str,
    device: torch.device | str,
) -> dict[str, Tensor]:
    """Return the tensors of a safetensors file, views of a copy of its bytes.

    Args:
        data: the bytes of the file.
        table: the shape and dtype of each tensor.
        offsets: the first byte of each tensor, from ``check_header``.
        source: the name of the file in errors.
        device: the device of the tensors; one copy moves them all there.

    Raises:
        IntegrityError: a value is not finite.
    """
    start = next(iter(offsets.values()))
    buffer = torch.empty(len(data) - start, dtype=torch.uint8)
    buffer.numpy()[:] = np.frombuffer(data, dtype=np.uint8, offset=start)
    buffer = buffer.to(device)
    tensors: dict[str, Tensor] = {}
    for dtype, group in groupby(offsets, key=lambda name: table[name].dtype):
        names = list(group)
        begin, lengths = offsets[names[0]] - start, [prod(table[name].shape) for name in names]
        flat = _aligned(buffer[begin:], begin)[: sum(lengths) * _TORCH[dtype].itemsize].view(_TORCH[dtype])  # [N]
        pieces = flat.split(lengths)
        # A value that is not finite makes the sum not finite. A sum may also overflow, so each tensor is checked then.
        if not bool(flat.sum(dtype=torch.float32).isfinite()):
            for name, piece in zip(names, pieces, strict=True):
                # One part at a time: the check needs twice the memory of its input.
                if not all(bool(part.isfinite().all()) for part in piece.split(_PART)):
                    raise IntegrityError(
                        f"{source}: the values of tensor {name} must be finite, got NaN or infinity. Train the adapter "
                        "again."
                    )
        for name, piece in zip(names, pieces, strict=True):
            place = piece.storage_offset() * piece.itemsize
            tensors[name] = _aligned(piece, place).view(table[name].shape)
    return tensors


def _aligned(tensor: Tensor, place: int) -> Tensor:
    """Return ``tensor``, or a copy if ``place``, its first byte in the buffer, is not aligned."""
    return tensor.clone() if place % _ALIGNMENT else tensor
