"""The probe of an adapter on a live base, run only where this machine has no result of it."""

from __future__ import annotations

from typing import TYPE_CHECKING

from finetune.adapters.probe import compare
from finetune.errors import ProbeError
from finetune.methods.adapter import placeholders
from finetune.methods.hooks import PLAIN, ActiveAdapter
from finetune.serving.receipts import find_base_values, find_receipt, keep_base_values, keep_receipt

if TYPE_CHECKING:
    from torch import Tensor

    from finetune.adapters.folder import AdapterFolder
    from finetune.adapters.manifest import AdapterManifest
    from finetune.adapters.probe import ProbeResult
    from finetune.assemble.base import Base
    from finetune.methods.hooks import AdapterHooks


def probe_once(base: Base, hooks: AdapterHooks, folder: AdapterFolder, candidate: ActiveAdapter) -> ProbeResult:
    """Return the comparison of an adapter's effect with the recorded one, from the receipt where there is one.

    Args:
        base: the base.
        hooks: the hooks of the base, those of the candidate included.
        folder: the folder of the adapter.
        candidate: the updates of the adapter.

    Raises:
        ProbeError: the adapter has another effect than when it was saved.
    """
    result = find_receipt(base, folder.digest)
    if result is None:
        result = _probe(base, hooks, folder.manifest, candidate)
        keep_receipt(base, folder.digest, result)
    return result


def _probe(base: Base, hooks: AdapterHooks, manifest: AdapterManifest, candidate: ActiveAdapter) -> ProbeResult:
    seed = manifest.probe.seed
    with hooks.using(candidate):
        on = base.probe(seed, placeholders(manifest.adapter))

    def compared(off: Tensor) -> ProbeResult:
        return compare(
            manifest.probe,
            off,
            on,
            dtype=base.model.dtype,
            quantization=base.quantization,
            has_head=manifest.adapter.has_head,
        )

    known = find_base_values(base, seed)
    if known is not None:
        try:
            return compared(known)
        except ProbeError:  # what a note holds must refuse no adapter: the base itself decides
            pass
    with hooks.using(PLAIN):
        off = base.probe(seed)
    keep_base_values(base, seed, off)
    return compared(off)
