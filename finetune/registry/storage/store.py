"""The interface of a store, which holds the bytes of a registry: five verbs over keys, of which one must be atomic.

The verbs and their meaning are obstore's, so that an object store is a thin wrapper. Creating a key that must
not exist is the only primitive that has to be atomic; nothing here relies on locks, renames or conditional
updates.
"""

import contextlib
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from datetime import datetime
from typing import BinaryIO, Literal, Protocol, runtime_checkable

from finetune.core.system_errors import explain
from finetune.errors import FinetuneError, IntegrityError, StoreError

CHUNK_BYTES = 1 << 20

_KEY_PART = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}")


class AlreadyExists(StoreError):
    """The error of ``put(mode="create")`` for a key that is taken."""


class ObjectMissing(StoreError):
    """The error of ``get`` and ``head`` for a key that does not exist."""


@dataclass(frozen=True, kw_only=True)
class ObjectMeta:
    """The size and time of an object, as ``head`` and ``list`` return them."""

    key: str
    size: int  # bytes
    modified: datetime  # by the store's clock


class Store(Protocol):
    """Whole objects under keys such as ``blobs/sha256/ab/ab12...``.

    Assumed: an object is visible whole or not at all, and once ``put`` has returned every reader sees it, and
    every ``list`` that begins then. Not assumed: that ``list`` is sorted, or that it sees what others write
    meanwhile.
    """

    def put(self, key: str, data: bytes | Iterable[bytes], *, mode: Literal["create", "overwrite"] = "create") -> None:
        """Write an object, lastingly. When iterating over ``data`` raises, no object is written.

        With ``mode="create"`` a store may hold all of ``data`` in memory; use ``overwrite`` for large objects.

        Raises:
            AlreadyExists: with ``mode="create"``, where an object has that key; that object is lasting.
            StoreError: the store refused; the object may have been written, unless the message excludes it.
        """
        ...

    def get(self, key: str) -> BinaryIO:
        """Open an object for reading from its start; the caller closes it.

        Raises:
            ObjectMissing: nothing has that key.
        """
        ...

    def head(self, key: str) -> ObjectMeta:
        """Return size and time of an object without reading it.

        Raises:
            ObjectMissing: nothing has that key.
        """
        ...

    def list(self, prefix: str = "") -> Iterator[ObjectMeta]:
        """Yield, in any order, every object below ``prefix``, which consists of whole parts of keys."""
        ...

    def delete(self, key: str) -> None:
        """Remove an object; a missing key is no error. After an error, the store does not remove it later."""
        ...


@runtime_checkable
class HasFolders(Protocol):
    """A store with folders, in which a look at one key costs less than its place in a listing."""

    def folders(self, prefix: str) -> Iterator[str]:
        """Yield, in any order, the parts of keys right below ``prefix``; some of them may belong to no key."""
        ...


@runtime_checkable
class KeepsAside(Protocol):
    """A store in which a killed write of an object leaves a file behind."""

    def list_aside(self) -> Iterator[ObjectMeta]:
        """Yield these files, also those of writers at work; none of their keys is the key of an object."""
        ...

    def delete_aside(self, key: str) -> None:
        """Remove one of these files; a writer that still uses it fails."""
        ...


def is_key(key: str) -> bool:
    """Return whether ``key`` is safe as a relative path on every system: no ``..``, no hidden and no empty part."""
    return all(_KEY_PART.fullmatch(part) for part in key.split("/"))


def check_key(key: str) -> str:
    """Return ``key`` when a store may use it.

    Raises:
        StoreError: the key could point outside of the store, or name a hidden file.
    """
    if not is_key(key):
        raise StoreError(
            "a key must consist of parts of a-z, A-Z, 0-9, '.', '_' and '-', each beginning with a letter or digit, "
            f"with '/' between them; got {key!r}"
        )
    return key


def spares_others(error: FinetuneError) -> bool:
    """Return whether an error is about one object of a store, so that the others may still be read.

    Args:
        error: the error that reading one object raised.
    """
    # The system gives an errno for one refused file; the error of a bucket that cannot be reached has none.
    return not isinstance(error, StoreError) or isinstance(error, ObjectMissing) or error.errno is not None


def exists(store: Store, key: str) -> bool:
    """Return whether an object with that key exists."""
    try:
        store.head(key)
    except ObjectMissing:
        return False
    return True


def chunks(file: BinaryIO) -> Iterator[bytes]:
    """Yield the rest of an open file, piece by piece."""
    while chunk := file.read(CHUNK_BYTES):
        yield chunk


@contextlib.contextmanager
def reading(store: Store, key: str) -> Iterator[BinaryIO]:
    """Open an object; an error of the disk during the read becomes a StoreError too.

    Raises:
        ObjectMissing: nothing has that key.
        StoreError: the object cannot be read.
    """
    try:
        with store.get(key) as file:
            yield file
    except StoreError:  # an OSError too, and already explained
        raise
    except OSError as error:
        raise explain(error, key, verb="read") from error


def read_all(store: Store, key: str, *, max_bytes: int) -> bytes:
    """Return a small object whole.

    Raises:
        ObjectMissing: nothing has that key.
        IntegrityError: the object has more than ``max_bytes`` bytes.
    """
    with reading(store, key) as file:
        data = file.read(max_bytes + 1)
    if len(data) > max_bytes:
        raise IntegrityError(f"{key}: must have at most {max_bytes} bytes, got more")
    return data
