"""From the bytes of a safetensors file to tensors: one copy, however many tensors it holds."""

from __future__ import annotations

import json
import struct
from itertools import groupby
from typing import TYPE_CHECKING

import numpy as np
import torch

from finetune.errors import IntegrityError

if TYPE_CHECKING:
    from torch import Tensor

DTYPES = {torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16"}
_TORCH = {name: dtype for dtype, name in DTYPES.items()}
# Bytes. Some matrix products give other last bits for weights that lie otherwise, and torch puts its own so.
_ALIGNMENT = 64


def tensors_of(data: bytes, *, source: str) -> dict[str, Tensor]:
    """Returns the tensors of a safetensors file.

    Args:
        data: the file, its header checked.
        source: what errors name.

    Raises:
        IntegrityError: a value is not finite.
    """
    start = 8 + struct.unpack("<Q", data[:8])[0]
    header = json.loads(data[8:start])
    header.pop("__metadata__", None)
    buffer = torch.empty(len(data) - start, dtype=torch.uint8)
    buffer.numpy()[:] = np.frombuffer(data, dtype=np.uint8, offset=start)
    tensors: dict[str, Tensor] = {}
    in_order = sorted(header.items(), key=lambda item: item[1]["data_offsets"][0])
    for name, entries in groupby(in_order, key=lambda item: item[1]["dtype"]):
        run = list(entries)
        begin, end = run[0][1]["data_offsets"][0], run[-1][1]["data_offsets"][1]
        tensors |= _cut(_aligned(buffer[begin:end], begin).view(_TORCH[name]), run, source)
    return tensors


def _cut(flat: Tensor, run: list[tuple[str, dict[str, list[int]]]], source: str) -> dict[str, Tensor]:
    """Returns the tensors that lie one after the other in ``flat`` [N], all of one dtype."""
    lengths = [(end - begin) // flat.itemsize for begin, end in (entry["data_offsets"] for _, entry in run)]
    pieces = flat.split(lengths)
    # What is not finite makes the sum so too. A sum that overflows proves nothing, so each is looked at.
    if not bool(flat.sum(dtype=torch.float32).isfinite()):
        for (name, _), piece in zip(run, pieces, strict=True):
            if not bool(piece.isfinite().all()):
                raise IntegrityError(f"{source}: {name} holds values that are not finite")
    return {
        name: _aligned(piece, piece.storage_offset() * piece.itemsize).view(entry["shape"])
        for (name, entry), piece in zip(run, pieces, strict=True)
    }


def _aligned(tensor: Tensor, begin: int) -> Tensor:
    return tensor.clone() if begin % _ALIGNMENT else tensor
