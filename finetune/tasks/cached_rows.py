"""Rows whose prompts went through a model, with their keys and values, and the beginning that rows share.

Legend of shapes: B rows, L tokens in the cache, T new tokens, H heads, D values of a head, V vocabulary; K position ids
of a token, where a model has several (M-RoPE).

Each row ends at the last column. The columns before it may hold padding anywhere: the mask takes them out, and each
token has its position id, so that they change neither attention nor positions.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers import DynamicCache

if TYPE_CHECKING:
    from collections.abc import Sequence

    from finetune.core.batch import Batch


@dataclass(frozen=True, kw_only=True)
class Prefix:
    """The beginning of a row, for other rows that begin with the same tokens and images.

    Attributes:
        ids: its token ids, P of them.
        keys_and_values: of each layer, [H, P, D] each.
        position: the position ids of the token after it, [1] or [K, 1].
    """

    ids: list[int]
    keys_and_values: list[tuple[Tensor, Tensor]]
    position: Tensor


class CachedRows:
    """Some rows of one model, with their keys and values.

    Attributes:
        cache: the keys and values of each layer, [B, H, L, D].
        mask: 1 for a token and 0 for padding, [B, L].
        positions: the position ids of each row's last tokens, [B, T] or [K, B, T].
        logits: fp32, of the next token of each row, [B, V].
    """

    def __init__(self, cache: DynamicCache, mask: Tensor, positions: Tensor, logits: Tensor):
        self.cache, self.mask, self.positions, self.logits = cache, mask, positions, logits

    @classmethod
    def prefill(cls, model: Any, batch: Batch) -> CachedRows:
        """Run the prompts of a batch through the model, as ``generate`` does.

        Args:
            model: the model in eval mode, on the device of the batch.
            batch: left-padded rows, each of which ends before its answer.
        """
        inputs = dict(batch.inputs)
        ids, cache = inputs.pop("input_ids"), new_cache(model)
        positions = model._prepare_position_ids_for_generation(ids, inputs)
        inputs |= _last_logits(model) | {"past_key_values": cache, "position_ids": positions, "use_cache": True}
        prepared = model.prepare_inputs_for_generation(ids, is_first_iteration=True, **inputs)
        logits = model(**prepared, return_dict=True).logits
        return cls(cache, inputs["attention_mask"], positions, logits[:, -1].float())

    @classmethod
    def after(
        cls, model: Any, prefixes: Sequence[Prefix], tails: Sequence[Sequence[int]], *, pad_id: int
    ) -> CachedRows:
        """Run the rest of some rows through the model.

        Args:
            model: the model in eval mode.
            prefixes: the beginning of each row.
            tails: the token ids after it, at least one for each row.
            pad_id: the token id of padding.
        """
        cache, device = new_cache(model), model.device
        layers: list[Any] = cache.layers
        for layer, parts in zip(layers, zip(*(p.keys_and_values for p in prefixes), strict=True), strict=True):
            keys, values = (_left_padded(tensors, dim=-2) for tensors in zip(*parts, strict=True))
            layer.update(keys, values)
        ids = _left_padded([torch.tensor(tail) for tail in tails], fill=pad_id).to(device)  # [B, T]
        real = _left_padded([torch.ones(len(tail), dtype=torch.long) for tail in tails])
        before = _left_padded([torch.ones(len(prefix.ids), dtype=torch.long) for prefix in prefixes])
        steps = (real.cumsum(dim=-1) - 1).clamp(min=0).to(device)  # [B, T]
        positions = torch.stack([prefix.position for prefix in prefixes], dim=-2).to(device) + steps
        mask = torch.cat([before, real], dim=1).to(device)
        return cls(cache, mask, positions, next_logits(model, ids, mask, positions, cache))

    @property
    def layers(self) -> list[tuple[Tensor, Tensor]]:
        """The keys and the values of each layer, [B, H, L, D]."""
        layers: list[Any] = self.cache.layers
        return [(layer.keys, layer.values) for layer in layers]

    def prefix(self, row: int, ids: Sequence[int]) -> Prefix:
        """Return the beginning of a row whose prompt was just run, which must be longer than it.

        Args:
            row: the number of the row.
            ids: the first ids of the row.
        """
        start = int(self.mask[row].int().argmax())
        stop = start + len(ids)
        parts = [(keys[row, :, start:stop], values[row, :, start:stop]) for keys, values in self.layers]
        return Prefix(
            ids=list(ids),
            keys_and_values=[(keys.clone(), values.clone()) for keys, values in parts],
            position=self.positions[..., row, stop : stop + 1],
        )


def new_cache(model: Any) -> DynamicCache:
    """Return an empty cache with the layers of a model."""
    return DynamicCache(config=model.config)


def next_logits(model: Any, ids: Tensor, mask: Tensor, positions: Tensor, cache: DynamicCache) -> Tensor:
    """Run tokens of some rows through the model, and return the fp32 logits [B, V] after the last of each row.

    Args:
        model: the model in eval mode.
        ids: the ids of the new tokens, [B, T].
        mask: 1 for a token and 0 for padding, of the cache and the new tokens, [B, L + T].
        positions: the position ids of the new tokens, [B, T] or [K, B, T].
        cache: the keys and values of the L tokens before, to which those of the new tokens are added.
    """
    attended: Tensor | None = None if bool(mask.all()) else mask
    if attended is not None and ids.shape[1] == 1 and takes_masks(model):
        attended = mask[:, None, None].bool()  # [B, 1, 1, L]: no model has to make it of the other in each step
    out = model(
        input_ids=ids,
        attention_mask=attended,
        position_ids=positions,
        past_key_values=cache,
        use_cache=True,
        return_dict=True,
        **_last_logits(model),
    )
    logits: Tensor = out.logits[:, -1].float()
    return logits


def takes_masks(model: Any) -> bool:
    """Return whether the attention of a model takes a bool mask [B, 1, T, L + T]; else it adds a mask."""
    return bool(model.config.get_text_config(decoder=True)._attn_implementation == "sdpa")


def _last_logits(model: Any) -> dict[str, int]:
    return {"logits_to_keep": 1} if model._supports_logits_to_keep() else {}


def _left_padded(tensors: Sequence[Tensor], *, dim: int = -1, fill: int = 0) -> Tensor:
    """Return tensors of different sizes in one dimension as one, with ``fill`` at its beginning."""
    size = max(tensor.shape[dim] for tensor in tensors)
    return torch.stack([_grown(tensor, size, dim, fill) for tensor in tensors])


def _grown(tensor: Tensor, size: int, dim: int, fill: int = 0) -> Tensor:
    before = (size - tensor.shape[dim], 0)
    return torch.nn.functional.pad(tensor, (0, 0) * (-dim - 1) + before, value=fill) if before[0] else tensor
