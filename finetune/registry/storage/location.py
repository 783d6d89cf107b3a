"""The locations of registries and caches, and the file that marks a registry."""

import contextlib
import os
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any

from finetune.adapters.manifest import canonical_json, sha256_hex, strict_json
from finetune.core.extras import missing_extras_named
from finetune.core.file_owner import user_folder
from finetune.errors import IntegrityError, ManifestError, RegistryError, StoreError
from finetune.registry.storage.local import LocalStore
from finetune.registry.storage.memory import MemoryStore
from finetune.registry.storage.store import AlreadyExists, ObjectMissing, Store, read_all

REGISTRY_KEY = "registry.json"
FORMAT = 1
MAX_REGISTRY_BYTES = 4096


def default_location() -> str:
    """Return the default location of the registry: ``$FINETUNE_REGISTRY``, or ``~/.finetune/registry``."""
    return os.environ.get("FINETUNE_REGISTRY") or str(user_folder() / "registry")


def default_cache() -> Path:
    """Return the folder of pulled adapters, which may be deleted at any time.

    It is ``adapters`` in ``$FINETUNE_CACHE``, or in ``~/.finetune/cache``.
    """
    cache = os.environ.get("FINETUNE_CACHE") or user_folder() / "cache"
    return Path(cache).expanduser().absolute() / "adapters"


def open_store(location: str) -> Store:
    """Return the store at a location: a folder, or a URL with a scheme in ``_OPENERS``.

    Raises:
        StoreError: the location is not valid.
        MissingExtraError: the location needs the extra ``object-store``.
    """
    scheme, is_url, _ = location.partition("://")
    if not is_url:
        if location.partition(":/")[0] in _OPENERS:
            raise StoreError(
                f"a URL must have '//' after the colon, got {location!r}. Give it as a string: a Path drops a '/'."
            )
        return LocalStore(location)
    if scheme not in _OPENERS:
        known = ", ".join(f"{name}://" for name in _OPENERS)
        raise StoreError(
            f"the location of a registry must be a folder, or a URL that begins with {known}; got {location!r}."
        )
    return _OPENERS[scheme](location)


def _open_bucket(location: str) -> Store:
    # Imported here, because it is an extra, and a folder needs no time for its import.
    with missing_extras_named():
        from finetune.registry.storage.object_store import ObjectStore
    return ObjectStore(location)


def _open_memory(location: str) -> Store:
    if location != "memory://":
        raise StoreError(
            f"a registry in memory must be memory:// without a name, got {location!r}. It cannot be opened twice."
        )
    return MemoryStore()


_OPENERS: dict[str, Callable[[str], Store]] = {
    "s3": _open_bucket,
    "gs": _open_bucket,
    "az": _open_bucket,
    "memory": _open_memory,
}


def is_registry(store: Store, *, create: bool = False) -> bool:
    """Return whether a store holds a registry.

    Args:
        store: the store.
        create: True to make a registry there when there is none.

    Raises:
        RegistryError: the registry has a format that this program does not know.
        IntegrityError: its ``registry.json`` is damaged.
    """
    try:
        registry_uuid(store)
    except ObjectMissing:
        if not create:
            return False
        about = {"format": FORMAT, "uuid": str(uuid.uuid4())}
        with contextlib.suppress(AlreadyExists):
            store.put(REGISTRY_KEY, canonical_json(about | {"checksum": _checksum(about)}), mode="create")
        registry_uuid(store)
    return True


def registry_uuid(store: Store) -> str:
    """Return the uuid of a registry, which stays the same when the registry is moved.

    Raises:
        ObjectMissing: there is no registry.
        RegistryError: the registry has a format that this program does not know.
        IntegrityError: its ``registry.json`` is damaged.
    """
    raw = read_all(store, REGISTRY_KEY, max_bytes=MAX_REGISTRY_BYTES)
    try:
        about = strict_json(raw, source=REGISTRY_KEY, max_bytes=MAX_REGISTRY_BYTES)
    except ManifestError as error:
        raise IntegrityError(str(error)) from None
    found = about.get("format") if isinstance(about, dict) else None
    if type(found) is not int:
        raise IntegrityError(f"{REGISTRY_KEY}: `format` must be a number, got {type(found).__name__}")
    if found != FORMAT:
        raise RegistryError(
            f"{REGISTRY_KEY}: `format` must be {FORMAT}, got {found}. Upgrade finetune to use this registry."
        )
    # The first registries were written without a checksum.
    right = _checksum(about)
    if about.keys() - {"checksum"} != {"format", "uuid"} or about.get("checksum", right) != right:
        raise IntegrityError(f"{REGISTRY_KEY}: the file is damaged. Restore a copy of it: it never changes.")
    return str(about["uuid"])


def refuse_in_registry(path: Path, *, elsewhere: str) -> None:
    """Refuse to write into the folder of a registry, which holds only objects.

    Args:
        path: the path to write to.
        elsewhere: the option that chooses another path, such as ``" (--into)"``.

    Raises:
        StoreError: the path lies in the folder of a registry.
    """
    path = path.expanduser().resolve()
    for folder in path.parents:
        if _is_registry_folder(folder):
            raise StoreError(
                f"{path} lies in the registry {folder}, which holds only published adapters. Choose a path outside of "
                f"it{elsewhere}."
            )


def _is_registry_folder(folder: Path) -> bool:
    if not os.path.isfile(folder / REGISTRY_KEY):
        return False
    try:
        return is_registry(LocalStore(folder))
    except IntegrityError:  # a damaged registry, or another file with that name
        return os.path.isdir(folder / "blobs" / "sha256")
    except RegistryError:  # of a newer format
        return True


def _checksum(about: dict[str, Any]) -> str:
    return sha256_hex(canonical_json({key: value for key, value in about.items() if key != "checksum"}))
