"""One set of weights in a process for each base, however many models answer with it.

Each model has a tree of modules of its own over the common tensors. So whatever is kept on modules is its own: the
adapters that reach into them, hooks, the positions that some families note between two steps of an answer. The
processor is common, and so is the lock that stands around it.
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
from finetune.build import Base, load_base
from finetune.errors import ModelError
from finetune.families.base import embedded_path, family_of
from finetune.families.placement import pick_device, pick_dtype
from finetune.families.quantization import settle_states, states_to_share

if TYPE_CHECKING:
    from collections.abc import Hashable, Iterable

    from torch import Tensor, nn

    from finetune.recipe import Quantization


class _Whole:
    """A base that nobody asks: others are made of it, and it goes with the last of them."""

    def __init__(self, base: Base):
        self.base = base
        settle_states(base.model)
        self._loaded = _versions(_tensors(base.model))

    @property
    def is_as_loaded(self) -> bool:
        """Whether nobody has written into the weights, moved them or begun to train them since."""
        return self._loaded == _versions(_tensors(self.base.model))

    def share(self) -> Base:
        """Return a base of other modules over the same tensors."""
        model = self.base.model
        kept = {id(tensor): tensor for tensor in _tensors(model)} | states_to_share(model)
        own = {each.name: getattr(self.base, each.name) for each in fields(Base)} | {"model": deepcopy(model, kept)}
        return _Shared(**own, whole=self)


@dataclass(frozen=True)
class _Shared(Base):
    whole: _Whole = field(kw_only=True, repr=False)  # which others can share as long as this is there


_WHOLES: WeakValueDictionary[Hashable, _Whole] = WeakValueDictionary()
_LOADING = threading.Lock()  # one base at a time: while transformers loads, it changes what torch makes by default


def shared_base(
    name_or_path: str,
    *,
    revision: str | None = None,
    device: str = "auto",
    dtype: str = "float32",
    quantization: Quantization | None = None,
    verify: str = "cached",
) -> Base:
    """Return a base over weights that are in this process already, where they are; any thread may call it.

    They are the same where all that they are loaded from is (see ``identify_base``), and device, dtype and quantization
    are. Weights that somebody wrote into, moved or began to train since are not shared with anybody who comes later;
    let those that share them be as they are.

    Args:
        name_or_path: an embedded base by name, a folder or a hub id.
        revision: of a hub id.
        device: as for ``pick_device``.
        dtype: as for ``pick_dtype``.
        quantization: of the language tower, ``4bit`` or ``8bit``.
        verify: ``cached`` trusts digests of files that have not changed; ``full`` hashes every byte.

    Raises:
        ModelError: it cannot be loaded, or its files change meanwhile.
    """
    path = embedded_path(name_or_path)
    path = str(Path(path).resolve()) if Path(path).is_dir() else path
    family_of(path, revision=revision)  # what is no base at all is told so first
    dtype, device = pick_dtype(dtype, path, revision=revision), pick_device(device)

    def key(verify: str) -> Hashable:
        base = identify_base(path, revision=revision, verify=verify)
        beside = digest_beside_weights(path, revision=revision, verify=verify)
        return path, base.revision, base.digest, beside, device, dtype, quantization

    wanted = key(verify)
    whole = _find(wanted)
    if whole is None:
        with _LOADING, torch.inference_mode(False):  # where writes are not counted
            whole = _find(wanted)
            if whole is None:
                loaded = load_base(path, revision=revision, device=device, dtype=dtype, quantization=quantization)
                if key("cached") != wanted:
                    raise ModelError(f"{path}: its files changed while they were read. Load it again.")
                whole = _WHOLES[wanted] = _Whole(loaded)
    return whole.share()


def _find(key: Hashable) -> _Whole | None:
    whole = _WHOLES.get(key)
    return whole if whole is not None and whole.is_as_loaded else None


def _tensors(model: nn.Module) -> list[Tensor]:
    return [*model.parameters(), *model.buffers()]


def _versions(tensors: Iterable[Tensor]) -> list[tuple[Any, ...]]:
    """Return what changes when somebody writes into a tensor, moves it, or ask for its gradient."""
    return [(t._version, t.data_ptr(), t.dtype, t.device, t.requires_grad) for t in tensors]
