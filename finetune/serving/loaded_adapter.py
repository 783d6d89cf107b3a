"""The loaded adapter, and the checks before it answers."""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from typing import TYPE_CHECKING

from finetune.adapters.base_identity import require_same_base, require_same_processor
from finetune.adapters.requirements import require_usable
from finetune.methods.adapter import placeholders, require_expected, updates
from finetune.methods.hooks import ActiveAdapter
from finetune.serving.probing import probe_once

if TYPE_CHECKING:
    from finetune.adapters.folder import AdapterFolder
    from finetune.adapters.manifest import AdapterManifest
    from finetune.adapters.probe import ProbeResult
    from finetune.assemble.base import Base
    from finetune.core.batch import Placeholders
    from finetune.methods.hooks import AdapterHooks


@dataclass(frozen=True, kw_only=True, eq=False)
class LoadedAdapter(ActiveAdapter):
    """An adapter that is ready to answer.

    Attributes:
        ref: the reference of the first request for it.
        digest: the SHA-256 of its manifest.
        manifest: the manifest that was saved with it.
        placeholders: the placeholders that its rows must hold; None if it needs none.
        probe: the comparison of its effect here with the effect recorded when it was saved.
        num_bytes: the number of bytes that it takes beside the base.
    """

    ref: str
    digest: str
    manifest: AdapterManifest
    placeholders: Placeholders | None
    probe: ProbeResult
    num_bytes: int


def bring_in(base: Base, hooks: AdapterHooks, folder: AdapterFolder, *, ref: str) -> LoadedAdapter:
    """Load an adapter from a verified folder, after every check that needs the base; the active adapter stays.

    Args:
        base: the base that the adapter changes.
        hooks: the hooks of the base.
        folder: the folder, read and verified.
        ref: the reference of the request.

    Raises:
        AdapterError: the adapter does not fit the base, or has another effect than when saved; the base is unchanged.
    """
    manifest = folder.manifest
    require_same_base(manifest.base, base.identity)
    require_same_processor(manifest.processor, base.digests)
    require_usable(manifest, architecture=base.family.architecture)
    require_expected(base.model, base.towers, manifest.adapter)
    found = updates(base.model, manifest.adapter, folder.tensors)
    hooks.add(found)
    try:
        probe = probe_once(base, hooks, folder, ActiveAdapter(updates=found))
        if probe.verdict == "inconclusive":
            warnings.warn(
                f"{ref}: its effect on the probe is below the noise of {base.model.dtype}, so the load could not "
                "verify that the effect equals the saved one",
                stacklevel=2,
            )
    except BaseException:
        hooks.remove(found)
        raise
    return LoadedAdapter(
        updates=found,
        ref=ref,
        digest=folder.digest,
        manifest=manifest,
        placeholders=placeholders(manifest.adapter),
        probe=probe,
        num_bytes=sum(update.num_bytes for update in found.values()),
    )
