"""One batch with a different adapter for each row: the low-rank updates of all rows in two batched multiplications.

Only an update that works row by row can be mixed: LoRA on the language tower. The vision tower gets any number of
images for a row, prompts have different lengths, and an override is a parameter of all rows.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from finetune.errors import AdapterError, MethodError
from finetune.methods.lora_update import LoraUpdate

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from torch import Tensor

    from finetune.interfaces import Towers, Update


def can_mix(updates: Mapping[str, Update], towers: Towers) -> bool:
    """Return whether a batch can mix rows of this adapter with rows of others."""
    inside = tuple(f"{path}." for path in towers.get("language", ()))
    return all(type(update) is LoraUpdate and name.startswith(inside) for name, update in updates.items())


def mix(by_row: Sequence[Mapping[str, Update]]) -> dict[str, Update]:
    """Return the updates of a batch, for each module that the adapter of any row changes.

    Args:
        by_row: the updates of each row's adapter, for which ``can_mix`` holds; empty for the plain base.
    """
    names = dict.fromkeys(name for updates in by_row for name in updates)
    return {name: MixedUpdate(name, [updates.get(name) for updates in by_row]) for name in names}  # type: ignore[misc]


class MixedUpdate:
    """``inner(x) + B(A(x)) * scaling``, with the A, B and scaling of each row's own adapter.

    Zeros pad adapters of lower rank; they add nothing.

    Args:
        name: the full name of the module, for messages.
        by_row: the update of each row; None if its adapter does not change the module. At least one is not None.
    """

    def __init__(self, name: str, by_row: Sequence[LoraUpdate | None]):
        self.name = name
        given = [update for update in by_row if update is not None]
        rank = max(len(update.down) for update in given)
        like, num_rows = given[0], len(by_row)
        self.module, self.rounds_first = like.module, like.rounds_first
        down = like.down.new_zeros(num_rows, rank, like.down.shape[1])
        up = like.up.new_zeros(num_rows, len(like.up), rank)
        for row, update in enumerate(by_row):
            if update is not None:
                down[row, : len(update.down)] = update.down
                torch.mul(update.up, update.scaling, out=up[row, :, : len(update.down)])
        self.down, self.up = down.transpose(1, 2), up.transpose(1, 2)  # [B, I, r], [B, r, O]

    @property
    def num_bytes(self) -> int:
        """Bytes of the tensors that the update holds beside the base."""
        return self.down.nbytes + self.up.nbytes

    def __call__(self, inner: Callable[..., Tensor], x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Return [B * K, T, O] for x [B * K, T, I], the K beams of a row one after the other.

        Raises:
            AdapterError: the number of rows of the input is not a multiple of the batch's.
        """
        num_rows = len(self.down)
        if x.ndim != 3 or len(x) % num_rows:
            raise AdapterError(
                f"{self.name} must get an input [B, T, I] for {num_rows} rows of one adapter each, got {list(x.shape)}"
                ". Use a separate batch for each adapter."
            )
        result = inner(x, *args, **kwargs)
        rows = x.reshape(num_rows, -1, x.shape[-1])  # [B, K * T, I]
        if rows.dtype == self.down.dtype == result.dtype:
            sums = result.view(num_rows, -1, result.shape[-1])
            return torch.baddbmm(sums, torch.bmm(rows, self.down), self.up).view(result.shape)
        added = torch.bmm(torch.bmm(rows.to(self.down.dtype), self.down), self.up).view(result.shape)
        if self.rounds_first:
            return result + added.to(result.dtype)
        return (result + added).to(result.dtype)

    def merging(self, name: str) -> Callable[[], None]:
        """Raise MethodError, since one weight cannot hold the updates of several rows."""
        raise MethodError(f"{name}: adapters of several rows cannot be merged into one weight. Merge one adapter.")
