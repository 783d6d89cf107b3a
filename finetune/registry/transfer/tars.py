"""A plain tar as a store: ``TarWriter`` writes it, and ``TarStore`` reads exactly that form.

A member's header depends on its key and size alone, so a header is valid only if it equals, byte for byte, the one that
``TarWriter`` writes. This refuses links, devices, folders, other owners, extension headers and other forms of a size.
Nothing is compressed. A member that claims bytes beyond the end of the file is refused before any of it is read.
"""

import hashlib
import io
import os
import tarfile
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import BinaryIO, Literal

from finetune.errors import IntegrityError, StoreError
from finetune.registry.storage.store import ObjectMeta, ObjectMissing, is_key

MAX_MEMBERS = 2_000_000
_BLOCK = tarfile.BLOCKSIZE  # 512 bytes
_END = bytes(2 * _BLOCK)
_KINDS = {
    tarfile.LNKTYPE: "a hard link",
    tarfile.SYMTYPE: "a symbolic link",
    tarfile.CHRTYPE: "a device",
    tarfile.BLKTYPE: "a device",
    tarfile.DIRTYPE: "a folder",
    tarfile.FIFOTYPE: "a pipe",
    tarfile.GNUTYPE_SPARSE: "a sparse file",
}
_COMPRESSED = (b"\x1f\x8b", b"BZh", b"\xfd7zXZ", b"\x28\xb5\x2f\xfd")  # gzip, bzip2, xz, zstd


def _header(key: str, size: int) -> bytes:
    member = tarfile.TarInfo(key)
    member.size = size
    return member.tobuf(tarfile.USTAR_FORMAT, "ascii", "strict")


def _padding(size: int) -> int:
    return -size % _BLOCK


class TarWriter:
    """A writer of tar members, one after the other.

    Attributes:
        size: the number of bytes written so far.
        sha256: the SHA-256 of these bytes.
    """

    def __init__(self, file: BinaryIO) -> None:
        self.size = 0
        self.sha256 = hashlib.sha256()
        self._file = file

    def add(self, key: str, size: int, pieces: Iterable[bytes]) -> None:
        """Write a member; ``pieces`` hold ``size`` bytes.

        Raises:
            StoreError: the member is too large for a tar.
        """
        try:
            header = _header(key, size)
        except ValueError as error:
            raise StoreError(f"cannot put {key} of {size} bytes into a tar: {error}") from None
        self._write(header)
        for piece in pieces:
            self._write(piece)
        self._write(bytes(_padding(size)))

    def finish(self) -> None:
        """Write the end."""
        self._write(_END)

    def _write(self, data: bytes) -> None:
        self._file.write(data)
        self.sha256.update(data)
        self.size += len(data)


@dataclass(frozen=True)
class _Place:
    offset: int
    size: int


class TarStore:
    """A read-only store over the members of an open tar file, which are all checked when it is opened."""

    def __init__(self, file: BinaryIO, path: Path) -> None:
        """Find and check the members.

        Args:
            file: the file, open for reading and seekable; it stays open while the store is used.
            path: its path, for messages.

        Raises:
            IntegrityError: the file is not exactly in the form of ``TarWriter``.
        """
        self._file = file
        self._path = path
        self._total = file.seek(0, os.SEEK_END)
        self._modified = datetime.fromtimestamp(os.fstat(file.fileno()).st_mtime, UTC)
        self._places = self._find()

    def put(self, key: str, data: bytes | Iterable[bytes], *, mode: Literal["create", "overwrite"] = "create") -> None:
        """Refuse: the store is read-only."""
        raise StoreError(f"cannot write to {self._path}: an archive is read-only")

    def get(self, key: str) -> BinaryIO:
        """Open a member."""
        place = self._place(key)
        return io.BufferedReader(_Part(self._file, place.offset, place.size))

    def head(self, key: str) -> ObjectMeta:
        """Return the size of a member."""
        return ObjectMeta(key=key, size=self._place(key).size, modified=self._modified)

    def list(self, prefix: str = "") -> Iterator[ObjectMeta]:
        """Yield every member below ``prefix``, in the order of the file."""
        start = prefix.rstrip("/") + "/" if prefix else ""
        for key, place in self._places.items():
            if key.startswith(start):
                yield ObjectMeta(key=key, size=place.size, modified=self._modified)

    def delete(self, key: str) -> None:
        """Refuse: the store is read-only."""
        self.put(key, b"")

    def _place(self, key: str) -> _Place:
        if key not in self._places:
            raise ObjectMissing(f"{self._path} holds no {key}")
        return self._places[key]

    def _find(self) -> dict[str, _Place]:
        places: dict[str, _Place] = {}
        offset = 0
        while (block := self._read(offset, _BLOCK)) != _END[:_BLOCK]:
            key, size = self._member(block, offset)
            if key in places:
                raise self._wrong(f"a member must be unique, but {key!r} is given twice")
            if len(places) == MAX_MEMBERS:
                raise self._wrong(f"it must have at most {MAX_MEMBERS} members, and has more")
            places[key] = _Place(offset + _BLOCK, size)
            offset += _BLOCK + size
            if offset + _padding(size) + len(_END) > self._total:
                raise self._wrong(f"{key} has {size} bytes by its header, more than the file: it is cut off or forged")
            if any(self._read(offset, _padding(size))):
                raise self._wrong(f"only zeros may follow the end of {key}, and other bytes do")
            offset += _padding(size)
        if self._read(offset, self._total - offset if self._total - offset <= len(_END) else 0) != _END:
            raise self._wrong("nothing may follow its end, but bytes do, or its end is cut off")
        return places

    def _member(self, block: bytes, offset: int) -> tuple[str, int]:
        """Return key and size of the member that begins with ``block``."""
        try:
            found = tarfile.TarInfo.frombuf(block, "ascii", "strict")
        except (tarfile.HeaderError, ValueError):
            raise self._wrong(
                self._no_tar(block) if offset == 0 else f"a header must stand at byte {offset}, and does not"
            ) from None
        if found.type != tarfile.REGTYPE:
            kind = _KINDS.get(found.type, f"of the type {found.type!r}")
            raise self._wrong(f"{found.name!r} is {kind}; only plain files are allowed")
        if not is_key(found.name):
            raise self._wrong(f"{found.name!r} is not a key of a registry")
        try:
            expected = _header(found.name, found.size)
        except ValueError:
            expected = b""
        if block != expected:
            raise self._wrong(f"the header of {found.name} differs from the one that export-archive writes")
        return found.name, found.size

    def _no_tar(self, block: bytes) -> str:
        if block.startswith(b"PK"):
            return "it must be a plain tar, and is a zip file"
        if block.startswith(_COMPRESSED):
            return "it must be a plain tar, and is compressed: uncompress it"
        return "it must be a plain tar, and is another file"

    def _read(self, offset: int, size: int) -> bytes:
        self._file.seek(offset)
        data = self._file.read(size)
        if len(data) != size:
            raise self._wrong(f"it is cut off at byte {offset + len(data)}")
        return data

    def _wrong(self, what: str) -> IntegrityError:
        return IntegrityError(f"{self._path}: {what}. Make it again with `finetune registry export-archive`.")


class _Part(io.RawIOBase):
    """A section of a file, as a separate file object."""

    def __init__(self, file: BinaryIO, offset: int, size: int) -> None:
        self._file = file
        self._offset = offset
        self._left = size

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: memoryview) -> int:  # type: ignore[override]
        self._file.seek(self._offset)
        data = self._file.read(min(len(buffer), self._left))
        buffer[: len(data)] = data
        self._offset += len(data)
        self._left -= len(data)
        return len(data)
