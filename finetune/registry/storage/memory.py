"""A store in the memory of this process, for tests and trials."""

import io
import threading
from collections.abc import Iterable, Iterator
from datetime import UTC, datetime
from typing import BinaryIO, Literal

from finetune.registry.storage.store import AlreadyExists, ObjectMeta, ObjectMissing, check_key


class MemoryStore:
    """A store whose objects are bytes in a dict. Threads may share it, and it ends with its process."""

    def __init__(self) -> None:
        self._objects: dict[str, tuple[bytes, datetime]] = {}
        self._lock = threading.Lock()

    def put(self, key: str, data: bytes | Iterable[bytes], *, mode: Literal["create", "overwrite"] = "create") -> None:
        """Write an object."""
        check_key(key)
        whole = data if isinstance(data, bytes) else b"".join(data)
        with self._lock:
            if mode == "create" and key in self._objects:
                raise AlreadyExists(f"{key} exists")
            self._objects[key] = (whole, datetime.now(UTC))

    def get(self, key: str) -> BinaryIO:
        """Open an object for reading."""
        return io.BytesIO(self._find(key)[0])

    def head(self, key: str) -> ObjectMeta:
        """Return size and time of an object."""
        data, modified = self._find(key)
        return ObjectMeta(key=key, size=len(data), modified=modified)

    def list(self, prefix: str = "") -> Iterator[ObjectMeta]:
        """Yield every object below ``prefix``."""
        start = f"{check_key(prefix.rstrip('/'))}/" if prefix else ""
        with self._lock:
            found = [(key, len(data), modified) for key, (data, modified) in self._objects.items()]
        for key, size, modified in found:
            if key.startswith(start):
                yield ObjectMeta(key=key, size=size, modified=modified)

    def delete(self, key: str) -> None:
        """Remove an object."""
        check_key(key)
        with self._lock:
            self._objects.pop(key, None)

    def _find(self, key: str) -> tuple[bytes, datetime]:
        check_key(key)
        with self._lock:
            if key not in self._objects:
                raise ObjectMissing(f"{key} is not there")
            return self._objects[key]
