"""The function ``load``, which loads an adapter by name on its base."""

from __future__ import annotations

from typing import TYPE_CHECKING

from finetune.adapters.folder import read_folder
from finetune.adapters.reference import as_folder
from finetune.adapters.requirements import require_usable
from finetune.errors import BaseMismatchError, DataError, ModelError, brief
from finetune.registry import AdapterRegistry
from finetune.serving.aliases import ALIAS_SECONDS
from finetune.serving.known_bases import find_base
from finetune.serving.shared_bases import shared_base
from finetune.serving.urls import UrlPolicy
from finetune.serving.vision_language_model import VisionLanguageModel

if TYPE_CHECKING:
    from pathlib import Path

    from finetune.adapters.manifest import BaseIdentity
    from finetune.recipe import Quantization
    from finetune.registry import Version
    from finetune.registry.log.version_files import Contents


def load(
    ref: str | Path,
    *,
    registry: str | Path | AdapterRegistry | None = None,
    base: str | None = None,
    revision: str | None = None,
    device: str = "auto",
    dtype: str = "float32",
    quantization: Quantization | None = None,
    verify_base: str = "cached",
    max_bytes: int | None = None,
    alias_seconds: float = ALIAS_SECONDS,
    allow_urls: bool | UrlPolicy = False,
) -> VisionLanguageModel:
    """Load an adapter on its base, and check that they belong together and that its effect equals the saved one.

    Models on one base in this process share its weights and its processor, and nothing else. See ``shared_base``.

    Args:
        ref: a registry reference such as ``medical/brain-mri@prod``, an adapter's folder, or ``base``.
        registry: a folder, a URL such as ``s3://bucket/prefix``, or a registry; ``$FINETUNE_REGISTRY`` or
            ``~/.finetune/registry`` by default.
        base: the base's folder, hub id or embedded name; None for the folder where this machine last used it.
        revision: the revision of a hub id.
        device: ``auto``, ``cpu``, ``cuda`` or ``mps``.
        dtype: the dtype of the base's weights: ``float32``, ``bfloat16``, ``float16``, or ``auto`` for its config's.
        quantization: the quantization of its language tower, ``4bit`` or ``8bit``; None for none.
        verify_base: ``cached`` trusts digests of files that have not changed; ``full`` hashes every byte.
        max_bytes: the limit, in bytes, for all loaded adapters together; None for no limit.
        alias_seconds: the number of seconds for which a resolved alias is reused before the registry is asked again.
        allow_urls: True to accept URLs as images, or a policy with the allowed URLs and the limits of a fetch.

    Returns:
        The model with the adapter active.

    Raises:
        BaseMismatchError: the base is unknown, or is not the base that the adapter was trained on.
        ModelError: the base cannot be loaded or verified with these arguments.
        AdapterError: the adapter is damaged, does not fit the base, or has another effect than when it was saved.
        PluginError: the adapter needs a package that is not installed.
        NotFoundError: the registry has no such adapter.
        AdapterReferenceError: ``ref`` is neither a reference nor a folder.
        DataError: ``allow_urls`` is neither a bool nor a ``UrlPolicy``.
    """
    _refuse_options(verify_base, allow_urls)
    registry = registry if isinstance(registry, AdapterRegistry) else AdapterRegistry(registry)
    found: tuple[Version, Contents] | None = None
    if base is None:
        identity, found = _needed_base(ref, registry)
        base, revision = find_base(identity), revision or identity.revision
    vlm = VisionLanguageModel(
        shared_base(base, revision=revision, device=device, dtype=dtype, quantization=quantization, verify=verify_base),
        registry=registry,
        max_bytes=max_bytes,
        alias_seconds=alias_seconds,
        urls=UrlPolicy() if allow_urls is True else allow_urls or None,
    )
    # The version whose base was loaded, also if an alias moved meanwhile.
    vlm.use(vlm.switcher.add_version(str(ref), *found) if found else None if str(ref) == "base" else ref)
    return vlm


def _refuse_options(verify_base: object, allow_urls: object) -> None:
    """Check the options of ``load`` that nothing later checks.

    Raises:
        ModelError: ``verify_base`` is neither ``cached`` nor ``full``.
        DataError: ``allow_urls`` is neither a bool nor a ``UrlPolicy``.
    """
    if verify_base not in ("cached", "full"):
        raise ModelError(f"verify_base must be 'cached' or 'full', got {brief(verify_base)}")
    if not isinstance(allow_urls, bool | UrlPolicy):
        raise DataError(f"allow_urls must be True, False or a UrlPolicy, got {brief(allow_urls)}")


def _needed_base(ref: str | Path, registry: AdapterRegistry) -> tuple[BaseIdentity, tuple[Version, Contents] | None]:
    """Return the identity of the base that an adapter needs, and the version of a reference with its contents.

    Raises:
        BaseMismatchError: ``ref`` is the plain base.
        AdapterError: this version cannot use the adapter.
    """
    if str(ref) == "base":
        raise BaseMismatchError("The ref 'base' needs a base model, got none. Name it with base= (--base).")
    if folder := as_folder(ref):
        manifest, found = read_folder(folder).manifest, None
    else:
        version = registry.resolve(str(ref))
        found = version, registry.read(version)
        manifest = found[1][0]
    require_usable(manifest)
    return manifest.base, found
