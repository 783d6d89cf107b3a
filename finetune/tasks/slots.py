"""The slots of a continuous batch: keys and values of rows that leave at their end and make room for others.

Legend of shapes: S slots, L columns, H heads, D values of a head, V vocabulary.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch.nn.functional import pad
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer

from finetune.core.matmul import FEW_ROWS
from finetune.tasks.cached_rows import next_logits

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor

    from finetune.tasks.cached_rows import CachedRows

ROOM = 64  # columns that are allocated at once, for as many steps


class Slots:
    """Slots with one row each; all rows end at the same column.

    A slot whose row has left computes on with a token of padding, which changes no other row.

    Args:
        model: the model in eval mode.
        size: the number of slots.
        pad_id: the token id of padding.
    """

    def __init__(self, model: Any, size: int, *, pad_id: int):
        self._model, self._pad_id = model, pad_id
        self.rows: list[Any] = [None] * size  # the caller's record of the row in each slot; None if it is free
        self._cache: Any = None  # a DynamicCache with layers of this file, once there were rows
        self._mask = torch.zeros(size, 0, dtype=torch.long, device=model.device)  # [S, L], 1 for a token
        self._positions: Any = None  # of the last tokens, [S, 1] or [K, S, 1]

    @property
    def live(self) -> list[int]:
        """The numbers of the slots that have a row."""
        return [slot for slot, row in enumerate(self.rows) if row is not None]

    @property
    def num_free(self) -> int:
        """The number of slots without a row."""
        return self.rows.count(None)

    def put(self, new: CachedRows, places: Sequence[int], rows: Sequence[Any]) -> None:
        """Put rows whose prompts went through the model into free slots.

        Args:
            new: the rows with their keys and values.
            places: the numbers of those among ``new`` that get a slot.
            rows: what ``rows`` holds for each of them.
        """
        slots = [slot for slot, row in enumerate(self.rows) if row is None][: len(places)]
        into, of = (torch.tensor(numbers, device=self._mask.device) for numbers in (slots, places))
        width = new.mask.shape[1]
        if self._cache is None:
            self._cache = DynamicCache()
            self._cache.layers = [_SlotLayer(keys, values, len(self.rows)) for keys, values in new.layers]
            self._positions = new.positions[..., :1, -1:].repeat_interleave(len(self.rows), dim=-2)
        self._mask = pad(self._mask, (max(0, width - self._mask.shape[1]), 0))
        self._mask[into] = pad(new.mask[of], (self._mask.shape[1] - width, 0))
        self._positions[..., into, :] = new.positions[..., of, -1:]
        for slot, row in zip(slots, rows, strict=True):
            self.rows[slot] = row
        unused = self._num_unused()
        self._mask = self._mask[:, unused:]
        for mine, (keys, values) in zip(self._cache.layers, new.layers, strict=True):
            mine.put(into, keys[of], values[of], columns=self._mask.shape[1])

    def step(self, tokens: Sequence[int]) -> Tensor:
        """Add one token to the row of each slot that has one; return the fp32 logits after them, [live, V]."""
        live = self.live
        ids = torch.full((len(self.rows), 1), self._pad_id)
        ids[live, 0] = torch.tensor(tokens)
        self._mask = pad(self._mask, (0, 1), value=1)
        self._positions = self._positions + 1
        few = FEW_ROWS.set(True)
        try:
            logits = next_logits(self._model, ids.to(self._mask.device), self._mask, self._positions, self._cache)
        finally:
            FEW_ROWS.reset(few)
        return logits if len(live) == len(self.rows) else logits[live]

    def shrink(self) -> None:
        """Give up the free slots."""
        live = self.live
        index = torch.tensor(live, device=self._mask.device)
        self.rows = [self.rows[slot] for slot in live]
        self._mask, self._positions = self._mask[index], self._positions[..., index, :]
        self._mask = self._mask[:, self._num_unused() :]
        for layer in self._cache.layers:
            layer.keep(index, columns=self._mask.shape[1])

    def _num_unused(self) -> int:
        """Return the number of columns at the beginning that no row uses."""
        return int(self._mask[self.live].any(dim=0).int().argmax())


class _SlotLayer(DynamicLayer):
    """Keys and values [S, H, L, D] of one layer, inside tensors with room for later columns.

    Args:
        keys: the keys of a layer of the same model.
        values: its values.
        size: the number of slots.
    """

    keys: Tensor
    values: Tensor

    def __init__(self, keys: Tensor, values: Tensor, size: int):
        super().__init__()
        self.lazy_initialization(keys, values)
        self._end = 0  # of the columns in use; they begin so many columns before it
        self._held = tuple(one.new_zeros(size, one.shape[1], 0, one.shape[3]) for one in (keys, values))
        self._show(0)

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Add the keys and values of new tokens; return those of all tokens."""
        count, columns = key_states.shape[-2], self.keys.shape[-2]
        if self._end + count > self._held[0].shape[-2]:
            self._move(columns)
        for held, new in zip(self._held, (key_states, value_states), strict=True):
            held[:, :, self._end : self._end + count] = new
        self._end += count
        self._show(columns + count)
        return self.keys, self.values

    def put(self, slots: Tensor, keys: Tensor, values: Tensor, *, columns: int) -> None:
        """Replace the rows of some slots, and use so many columns from now on."""
        width = min(columns, keys.shape[-2])
        if self._end < columns:
            self._move(columns)
        for held, new in zip(self._held, (keys, values), strict=True):
            held[slots, :, self._end - width : self._end] = new[:, :, -width:]
        self._show(columns)

    def keep(self, slots: Tensor, *, columns: int) -> None:
        """Keep some slots alone, and use so many columns from now on."""
        self._held = tuple(held[slots] for held in self._held)
        self._show(columns)

    def _show(self, columns: int) -> None:
        self.keys, self.values = (held[:, :, self._end - columns : self._end] for held in self._held)

    def _move(self, columns: int) -> None:
        """Move the columns in use into tensors that hold ``columns`` up to the present end, and have room after it."""
        moved = []
        for held, used in zip(self._held, (self.keys, self.values), strict=True):
            new = held.new_zeros(*held.shape[:2], columns + ROOM, held.shape[3])
            new[:, :, columns - used.shape[-2] : columns] = used
            moved.append(new)
        self._held, self._end = tuple(moved), columns
