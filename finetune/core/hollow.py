"""Hollow tensors: one value in memory, shown in a whole shape. They stand for tensors whose values no code reads."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from torch import Tensor


def hollow(shape: Sequence[int], dtype: torch.dtype, value: float = 0) -> Tensor:
    """Return a tensor of this shape with the same ``value`` everywhere, which takes the memory of one value."""
    return torch.full((), value, dtype=dtype).expand(*shape)


def is_hollow(tensor: Tensor) -> bool:
    """Return whether ``hollow`` made a tensor, or ``join`` did of such tensors."""
    return tensor.ndim > 0 and tensor.numel() > 0 and not any(tensor.stride())


def mapped(tensor: Tensor, function: Callable[[Tensor], Tensor]) -> Tensor:
    """Return ``function`` of a tensor, which moves or converts it; a hollow tensor stays hollow."""
    if not is_hollow(tensor):
        return function(tensor)
    return function(tensor[(0,) * tensor.ndim]).expand(tensor.shape)


def join(tensors: Sequence[Tensor]) -> Tensor:
    """Return tensors joined along their first dimension; zeros fill the ends of those that are smaller in another one.

    Image processors fill inputs of rows with fewer or smaller images in the same way.
    """
    if len(tensors) == 1:
        return tensors[0]
    sizes = [max(found) for found in zip(*(tensor.shape[1:] for tensor in tensors), strict=True)]
    same = all([*tensor.shape[1:]] == sizes for tensor in tensors)
    if all(map(is_hollow, tensors)) and len(values := {_first(tensor) for tensor in tensors}) == 1:
        if same:
            return hollow([sum(len(tensor) for tensor in tensors), *sizes], tensors[0].dtype, values.pop())
        return _joined_hollow(tensors, sizes)
    if not same:
        tensors = [_grown(tensor, sizes) for tensor in tensors]
    return torch.cat([*tensors])


def _first(tensor: Tensor) -> float:
    """Return the one value of a hollow tensor."""
    return tensor[(0,) * tensor.ndim].item()


def _joined_hollow(tensors: Sequence[Tensor], sizes: Sequence[int]) -> Tensor:
    """Return hollow tensors of different sizes, joined; only the dimensions that differ take memory."""
    differs = [any(tensor.shape[i] != size for tensor in tensors) for i, size in enumerate(sizes, 1)]
    small = [
        tensor[(slice(None), *(slice(None) if d else slice(1) for d in differs))].contiguous() for tensor in tensors
    ]
    kept = [size if d else 1 for size, d in zip(sizes, differs, strict=True)]
    return torch.cat([_grown(tensor, kept) for tensor in small]).expand(-1, *sizes)


def _grown(tensor: Tensor, sizes: Sequence[int]) -> Tensor:
    """Return a tensor with zeros behind its values up to ``sizes``, those of all dimensions but the first."""
    grown = tensor.new_zeros(len(tensor), *sizes)
    grown[(slice(None), *(slice(size) for size in tensor.shape[1:]))] = tensor
    return grown
