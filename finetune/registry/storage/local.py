"""A store in a folder, of one machine or of a network file system with hard links."""

import contextlib
import errno
import os
import re
import uuid
from collections.abc import Iterable, Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import BinaryIO, Literal, NoReturn

from finetune.core.regular_file import open_regular
from finetune.core.system_errors import explain
from finetune.errors import StoreError
from finetune.registry.storage.store import AlreadyExists, ObjectMeta, ObjectMissing, check_key, is_key

_ELSEWHERE = " (--registry or FINETUNE_REGISTRY)"
_ASIDE = re.compile(r"\.tmp-[0-9a-f]{32}")
_NO_LINKS = {errno.EPERM, errno.EOPNOTSUPP, errno.ENOSYS, errno.EMLINK}
# Some network file systems cannot sync a folder; they decide themselves when a link is lasting.
_NO_FOLDER_SYNC = {errno.EINVAL, errno.EOPNOTSUPP}


def _sync_folder(folder: Path) -> None:
    if os.name == "nt":
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in _NO_FOLDER_SYNC:
            raise
    finally:
        os.close(descriptor)


def _make_folder(folder: Path) -> None:
    """Create a folder and its parents so that a power cut cannot remove them."""
    if folder.is_dir():
        return
    _make_folder(folder.parent)
    try:
        os.mkdir(folder)
    except FileExistsError:
        if not folder.is_dir():
            raise
    _sync_folder(folder.parent)


class LocalStore:
    """A store whose objects are files below ``root``: written to a temporary file, synced, and hard-linked to the name.

    The link fails when the name is taken. This makes ``mode="create"`` atomic between processes and between machines.
    The first write creates the folder.
    """

    def __init__(self, root: str | Path) -> None:
        self.root = Path(root).expanduser().absolute()

    def put(self, key: str, data: bytes | Iterable[bytes], *, mode: Literal["create", "overwrite"] = "create") -> None:
        """Write an object; it is on the disk when this returns."""
        target = self._path(key)
        # Hidden, so that the file of a killed writer is not a key and is not listed.
        aside = target.with_name(f".tmp-{uuid.uuid4().hex}")
        try:
            if mode == "create" and target.exists():
                self._refuse(target, key)
            _make_folder(target.parent)
            try:
                with open(aside, "xb") as file:
                    for chunk in (data,) if isinstance(data, bytes) else data:
                        file.write(chunk)
                    file.flush()
                    os.fsync(file.fileno())
                if mode == "create":
                    self._link(aside, target, key)
                else:
                    os.replace(aside, target)
            finally:
                with contextlib.suppress(OSError):
                    os.unlink(aside)
            self._sync(target)
        except StoreError:  # an OSError too, and already explained
            raise
        except OSError as error:
            raise explain(error, target, verb="write", elsewhere=_ELSEWHERE) from error

    def get(self, key: str) -> BinaryIO:
        """Open an object for reading."""
        path = self._path(key)
        try:
            return open_regular(path)
        except FileNotFoundError:
            raise ObjectMissing(f"{path} is not there") from None
        except OSError as error:
            raise explain(error, path, verb="read", elsewhere=_ELSEWHERE) from error

    def head(self, key: str) -> ObjectMeta:
        """Return size and time of an object."""
        return self._look(f"{self.root}/{check_key(key)}", key)

    def list(self, prefix: str = "") -> Iterator[ObjectMeta]:
        """Yield every object below ``prefix``."""
        for path in self._files(self._path(prefix.rstrip("/")) if prefix else self.root):
            if is_key(key := self._key(path)):
                # A file may be deleted between the listing and the look at its size.
                with contextlib.suppress(ObjectMissing):
                    yield self.head(key)

    def folders(self, prefix: str) -> Iterator[str]:
        """Yield the names of the folders right below ``prefix``."""
        path = self._path(prefix)
        try:
            with os.scandir(path) as entries:
                yield from (entry.name for entry in entries if entry.is_dir() and is_key(entry.name))
        except (FileNotFoundError, NotADirectoryError):
            return
        except OSError as error:
            raise explain(error, path, verb="list", elsewhere=_ELSEWHERE) from error

    def list_aside(self) -> Iterator[ObjectMeta]:
        """Yield the temporary files of writers, at work or killed."""
        for path in self._files(self.root):
            if _ASIDE.fullmatch(path.name):
                with contextlib.suppress(ObjectMissing):
                    yield self._look(path, self._key(path))

    def delete_aside(self, key: str) -> None:
        """Remove a temporary file of a writer."""
        folder, _, name = key.rpartition("/")
        if not _ASIDE.fullmatch(name):
            raise StoreError(f"a temporary file of a writer must be named .tmp-<32 hexadecimal digits>, got {key!r}")
        path = (self._path(folder) if folder else self.root) / name
        try:
            path.unlink(missing_ok=True)
        except OSError as error:
            raise explain(error, path, verb="delete", elsewhere=_ELSEWHERE) from error

    def delete(self, key: str) -> None:
        """Remove an object."""
        path = self._path(key)
        try:
            os.unlink(path)
            self._sync(path)
        except FileNotFoundError:
            return
        except OSError as error:
            raise explain(error, path, verb="delete", elsewhere=_ELSEWHERE) from error

    def _path(self, key: str) -> Path:
        return self.root / check_key(key)

    def _key(self, path: Path) -> str:
        return path.relative_to(self.root).as_posix()

    def _look(self, path: Path | str, key: str) -> ObjectMeta:
        try:
            found = os.stat(path)
            return ObjectMeta(key=key, size=found.st_size, modified=datetime.fromtimestamp(found.st_mtime, UTC))
        except FileNotFoundError:
            raise ObjectMissing(f"{path} is not there") from None
        except OSError as error:
            raise explain(error, path, verb="read", elsewhere=_ELSEWHERE) from error

    def _files(self, start: Path) -> Iterator[Path]:
        def stop(error: OSError) -> None:
            if not isinstance(error, FileNotFoundError):
                raise explain(error, Path(error.filename or start), verb="list", elsewhere=_ELSEWHERE) from error

        for folder, _, names in os.walk(start, onerror=stop):
            yield from (Path(folder, name) for name in names)

    def _sync(self, path: Path) -> None:
        # All the way up: the process that made one of these folders may have died before it synced it.
        for folder in path.parents:
            _sync_folder(folder)
            if folder == self.root:
                break

    def _refuse(self, target: Path, key: str) -> NoReturn:
        # Synced, because later objects that rely on this one must not outlive it in a power cut.
        self._sync(target)
        raise AlreadyExists(f"{key} exists already in {self.root}")

    def _link(self, aside: Path, target: Path, key: str) -> None:
        try:
            os.link(aside, target)
        except FileExistsError:
            self._refuse(target, key)
        except OSError as error:
            if error.errno not in _NO_LINKS:
                raise
            raise StoreError(
                f"cannot write {target}: this file system has no hard links ({error.strerror}), without "
                f"which two writers could overwrite each other. Choose a folder on another file system{_ELSEWHERE}."
            ) from error
