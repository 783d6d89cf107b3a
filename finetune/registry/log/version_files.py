"""The files of a published version as bytes, for a load that needs no folder."""

import contextlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import BinaryIO

from finetune.adapters.manifest import AdapterManifest, FileEntry
from finetune.core.regular_file import open_regular
from finetune.core.system_errors import explain
from finetune.errors import IntegrityError
from finetune.registry.log.versions import Version
from finetune.registry.storage.adapter_folders import load_manifest, read_manifest
from finetune.registry.storage.blobs import blob_key, checked
from finetune.registry.storage.store import ObjectMissing, Store, reading

# The manifest of a version, and the function that reads one of its files; every byte is checked.
Contents = tuple[AdapterManifest, Callable[[str], bytes]]


def read_published(store: Store, version: Version) -> Contents:
    """Return a version's manifest, and the function that reads one of its files, straight from the store's blobs.

    Raises:
        IntegrityError: a blob is missing, or its bytes do not match its digest; the function raises it too.
    """
    with nothing_missing(version.ref):
        _, manifest = load_manifest(store, version.digest, version.full_name)

    def read(name: str) -> bytes:
        with nothing_missing(version.ref):
            entry = manifest.files[name]
            key = blob_key(entry.sha256)
            with reading(store, key) as file:
                return _whole(file, entry, what=key)

    return manifest, read


def read_pulled(folder: Path) -> Contents:
    """Return the manifest of a pulled folder, and the function that reads one of its files and checks it again."""
    _, manifest = read_manifest(folder)

    def read(name: str) -> bytes:
        try:
            with open_regular(folder / name) as file:
                return _whole(file, manifest.files[name], what=str(folder / name))
        except OSError as error:
            raise explain(error, folder / name, verb="read") from error

    return manifest, read


def _whole(file: BinaryIO, entry: FileEntry, *, what: str) -> bytes:
    """Return the contents of a file in one piece, which is the fastest way to read weights."""
    (data,) = checked([file.read(entry.size + 1)], entry, what=what)
    return data


@contextlib.contextmanager
def nothing_missing(ref: str) -> Iterator[None]:
    """Turn the error for a missing blob into an error about a damaged registry.

    Raises:
        IntegrityError: a blob is missing, instead of ``ObjectMissing``.
    """
    try:
        yield
    except ObjectMissing as error:
        raise IntegrityError(
            f"cannot pull {ref}, because the registry is damaged: {error}. "
            "Look for more damage with `finetune registry verify`."
        ) from None
