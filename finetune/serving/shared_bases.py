"""One set of weights in a process for each base, which all models on it share.

Each model has its own modules over the shared tensors. So the state of the modules belongs to one model: the hooks of
its adapters, and the positions that some families store between two steps of an answer. The models share the processor
and its lock.
"""

from __future__ import annotations

import threading
from copy import deepcopy
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any
from weakref import WeakValueDictionary

import torch

from finetune.adapters.base_identity import digest_beside_weights, identify_base
from finetune.assemble.base import Base
from finetune.assemble.loading import load_base
from finetune.errors import ModelError
from finetune.families.base import embedded_path, family_of
from finetune.families.placement import pick_device, pick_dtype
from finetune.families.quantization import settle_states, states_to_share

if TYPE_CHECKING:
    from collections.abc import Hashable, Iterable

    from torch import Tensor, nn

    from finetune.recipe import Quantization


class _Whole:
    """A base that answers no requests itself: other bases share its tensors, and the last of them frees it."""

    def __init__(self, base: Base):
        self.base = base
        settle_states(base.model)
        self._loaded = _versions(_tensors(base.model))

    @property
    def is_as_loaded(self) -> bool:
        """True if the weights are as loaded: not written, moved or trained since."""
        return self._loaded == _versions(_tensors(self.base.model))

    def share(self) -> Base:
        """Return a base of other modules over the same tensors."""
        model = self.base.model
        kept = {id(tensor): tensor for tensor in _tensors(model)} | states_to_share(model)
        own = {each.name: getattr(self.base, each.name) for each in fields(Base)} | {"model": deepcopy(model, kept)}
        return _Shared(**own, whole=self)


@dataclass(frozen=True)
class _Shared(Base):
    whole: _Whole = field(kw_only=True, repr=False)  # alive while a base shares it


_WHOLES: WeakValueDictionary[Hashable, _Whole] = WeakValueDictionary()
_LOADING = threading.Lock()  # one base at a time, because transformers changes torch's default dtype while it loads


def shared_base(
    name_or_path: str,
    *,
    revision: str | None = None,
    device: str = "auto",
    dtype: str = "float32",
    quantization: Quantization | None = None,
    verify: str = "cached",
) -> Base:
    """Return a base over weights that this process has already, or load them; any thread may call it.

    Callers share weights if the files of the base (see ``identify_base``), the device, the dtype and the quantization
    are the same. Weights that were written, moved or trained since are not shared with later callers. Do not change
    shared weights.

    Args:
        name_or_path: an embedded base by name, a folder or a hub id.
        revision: the revision of a hub id.
        device: the device, as ``pick_device`` takes it.
        dtype: the dtype of the weights, as ``pick_dtype`` takes it.
        quantization: the quantization of the language tower, ``4bit`` or ``8bit``; None for none.
        verify: ``cached`` trusts digests of files that have not changed; ``full`` hashes every byte.

    Raises:
        ModelError: the base cannot be loaded, or its files change meanwhile.
    """
    path = embedded_path(name_or_path)
    path = str(Path(path).resolve()) if Path(path).is_dir() else path
    family_of(path, revision=revision)  # first, to refuse a folder that is not a base
    dtype, device = pick_dtype(dtype, path, revision=revision), pick_device(device)

    def key(verify: str) -> Hashable:
        base = identify_base(path, revision=revision, verify=verify)
        beside = digest_beside_weights(path, revision=revision, verify=verify)
        return path, base.revision, base.digest, beside, device, dtype, quantization

    wanted = key(verify)
    whole = _find(wanted)
    if whole is None:
        with _LOADING, torch.inference_mode(False):  # inference tensors do not count writes
            whole = _find(wanted)
            if whole is None:
                loaded = load_base(path, revision=revision, device=device, dtype=dtype, quantization=quantization)
                if key("cached") != wanted:
                    raise ModelError(f"{path}: the files of the base changed while it was loaded. Load it again.")
                whole = _WHOLES[wanted] = _Whole(loaded)
    return whole.share()


def _find(key: Hashable) -> _Whole | None:
    whole = _WHOLES.get(key)
    return whole if whole is not None and whole.is_as_loaded else None


def _tensors(model: nn.Module) -> list[Tensor]:
    return [*model.parameters(), *model.buffers()]


def _versions(tensors: Iterable[Tensor]) -> list[tuple[Any, ...]]:
    """Return values that change when a tensor is written or moved, or requires a gradient."""
    return [(t._version, t.data_ptr(), t.dtype, t.device, t.requires_grad) for t in tensors]
