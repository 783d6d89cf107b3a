"""Checks of an adapter in use before torch is imported: its reference, its base and the image."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from finetune.adapters.base_check import check_base
from finetune.adapters.base_identity import refuse_other_base
from finetune.adapters.reference import as_folder
from finetune.adapters.requirements import require_usable
from finetune.errors import BaseMismatchError, DataError
from finetune.lookup import did_you_mean, import_string
from finetune.registry import AdapterRegistry
from finetune.registry.storage.adapter_folders import read_manifest
from finetune.serving.known_bases import find_base
from finetune.tables import EMBEDDED_BASES

if TYPE_CHECKING:
    from finetune.adapters.manifest import AdapterManifest

_PLAIN_BASE = "base"  # the reference that means no adapter
_URL_SCHEMES = ("http:", "https:", "data:")


def check_adapter(
    ref: str, *, base: str | None = None, revision: str | None = None, registry: str | AdapterRegistry | None = None
) -> None:
    """Check that an adapter exists, and that its base is on this machine or can be fetched.

    Args:
        ref: a registry reference, an adapter's folder, or ``base``.
        base: the base's folder, hub id or embedded name; None for the folder where the adapter's base was last seen.
        revision: the revision of a hub id.
        registry: the registry in which names are looked up; the default one if None.

    Raises:
        FinetuneError: something is missing; the message has what to do.
    """
    if base is not None:  # this check is cheaper than one of a remote registry
        check_base(base, revision=revision)
    if ref == _PLAIN_BASE:
        if base is None:
            raise BaseMismatchError(
                "ref 'base' is the base alone, so it needs a base model, got none. Set base= (--base)."
            )
        return
    manifest = check_reference(ref, registry if isinstance(registry, AdapterRegistry) else AdapterRegistry(registry))
    if base is None:
        check_base(find_base(manifest.base), revision=revision or manifest.base.revision)
    elif (folder := Path(import_string(EMBEDDED_BASES[base])() if base in EMBEDDED_BASES else base)).is_dir():
        refuse_other_base(manifest.base, folder)


def check_reference(ref: str, registry: AdapterRegistry) -> AdapterManifest:
    """Return the manifest that a reference leads to, without reading weights.

    Args:
        ref: a registry reference, or an adapter's folder.
        registry: the registry in which names are looked up.

    Raises:
        AdapterReferenceError: the text is neither a reference nor a folder.
        ManifestError: the folder holds no adapter.
        RegistryError: the registry has no such adapter, or cannot be read.
        PluginError: the adapter needs a package that is not installed.
    """
    folder = as_folder(ref)
    manifest = registry.read(ref)[0] if folder is None else read_manifest(folder)[1]
    require_usable(manifest)
    return manifest


def check_image(image: str | Path) -> None:
    """Check that a file is an image that can be read.

    Raises:
        DataError: the file is missing, or not a readable image.
    """
    path = Path(image)
    if str(image).startswith(_URL_SCHEMES):
        raise DataError(
            f"an image must be a local file, got the URL {str(image)[:60]}. Save the image, and give its path."
        )
    if not path.exists():
        where = "" if path.is_absolute() else f" below {Path.cwd()}"
        raise DataError(f"no image at {path}: there is no such file{where}.{_alike(path)}")
    if not path.is_file():
        raise DataError(f"an image must be a file, got the folder {path}. Give the path of one image.")
    from finetune.data.images import open_image

    open_image(path)


def check_question(
    ref: str, image: str | Path, *, base: str | None = None, registry: str | AdapterRegistry | None = None
) -> None:
    """Check the arguments of ``finetune ask`` before a model is loaded.

    Args:
        ref: as for ``check_adapter``.
        image: the path of the image.
        base: as for ``check_adapter``.
        registry: as for ``check_adapter``.

    Raises:
        FinetuneError: something is missing; the message has what to do.
    """
    check_adapter(ref, base=base, registry=registry)
    check_image(image)


def _alike(path: Path) -> str:
    parent = path.parent
    return did_you_mean(path, [parent / one.name for one in parent.iterdir()]) if parent.is_dir() else ""
