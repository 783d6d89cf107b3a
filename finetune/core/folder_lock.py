"""A lock for one process at a time in a folder: a lock of the system, and a file with the name of its owner.

The system drops its lock when a process ends for any reason, so a killed process keeps no folder locked. The next
process finds the file that names the killed one, logs that, and continues. If the file system has no locks, the file
alone decides: it is valid as long as a process with that id and start time runs on its host.
"""

from __future__ import annotations

import contextlib
import errno
import getpass
import json
import os
import socket
import stat
import sys
import time
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import IO, TYPE_CHECKING

from finetune.core.file_state import boot_id
from finetune.errors import FolderInUseError, TrainingError
from finetune.lookup import import_string

if sys.platform != "win32":
    import fcntl

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

LOCK_NAME = ".lock"
_HELD: set[Path] = set()  # locks of this process, which a record lock does not keep out
_NO_LOCKS = {errno.ENOLCK, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS, errno.EINVAL}
_NOT_OURS = {errno.ELOOP, errno.EISDIR, errno.ENXIO}  # a link, a folder or a socket
# Do not follow a link, and do not wait for a FIFO. Windows has neither flag.
_CAREFULLY = getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_NONBLOCK", 0)
_SETTLE = 0.5  # seconds after which two processes that wrote at once both read the name of the last one


@dataclass(frozen=True, kw_only=True)
class Owner:
    """The process that holds a folder."""

    user: str
    host: str
    pid: int
    started: str | None  # start of the process, as a text that is only compared; None if unknown
    since: str  # time of the lock, in UTC

    @classmethod
    def here(cls) -> Owner:
        """Return this process as an owner."""
        return cls(
            user=_user(),
            host=socket.gethostname(),
            pid=os.getpid(),
            started=_started(os.getpid()),
            since=time.strftime("%Y-%m-%d %H:%M:%S UTC", time.gmtime()),
        )

    @property
    def is_alive(self) -> bool | None:
        """True if the process still runs; None if this host cannot check it."""
        if self.host != socket.gethostname():
            return None
        return _is_running(self.pid) and self.started in (None, _started(self.pid))

    def __str__(self) -> str:
        """Return the owner as text for a message."""
        return f"process {self.pid} of {self.user} on {self.host}, since {self.since}"


@contextlib.contextmanager
def locked(folder: Path, *, log: Callable[[str], object] = print, what_else: str) -> Iterator[None]:
    """Lock ``folder`` inside the block, and make it where it does not exist.

    Args:
        folder: the folder that one process at a time may write.
        log: the function that is called with a line when this process takes over the lock of one that has ended.
        what_else: a sentence with the user's alternatives to waiting, for errors.

    Raises:
        FolderInUseError: another process holds the lock, or may hold it.
        TrainingError: the path of the lock holds something else.
        OSError: the folder cannot be written.
    """
    folder.mkdir(parents=True, exist_ok=True)
    path = folder.resolve() / LOCK_NAME
    if path in _HELD:
        raise FolderInUseError(f"{folder} is in use: this process has already locked it. {what_else}")
    file, has_system_lock = _open(path, folder, what_else)
    try:
        _take(file, path, folder, log=log, what_else=what_else, has_system_lock=has_system_lock)
    except BaseException:
        file.close()
        raise
    _HELD.add(path)
    try:
        yield
    finally:
        _HELD.discard(path)
        # Remove the file while the lock is held: a process that waits for it then finds another file, or none.
        with contextlib.suppress(OSError):
            path.unlink()
        file.close()


def _open(path: Path, folder: Path, what_else: str) -> tuple[IO[str], bool]:
    """Return the file with the system's lock on it, and whether the file system has such locks.

    The lock belongs to the process and not to the open file: a worker process that outlives the run for a moment would
    inherit a lock of the file.
    """
    while True:
        file = open(path, "a+", encoding="utf-8", opener=partial(_open_own, what_else=what_else))
        if sys.platform == "win32":
            return file, False
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if os.path.samestat(os.fstat(file.fileno()), path.stat()):
                return file, True
        except FileNotFoundError:
            pass
        except OSError as error:
            if error.errno in _NO_LOCKS:
                return file, False
            owner = _read(file)
            file.close()
            if error.errno not in (errno.EAGAIN, errno.EACCES):
                raise
            raise _in_use(folder, owner, what_else) from None
        file.close()  # its owner has just unlocked it


def _open_own(path: str, flags: int, *, what_else: str) -> int:
    """Open a lock and return its descriptor; refuse links, which would lead the text into another file."""
    try:
        descriptor = os.open(path, flags | _CAREFULLY, 0o666)
    except OSError as error:
        if error.errno not in _NOT_OURS:
            raise
    else:
        found = os.fstat(descriptor)
        if stat.S_ISREG(found.st_mode) and found.st_nlink <= 1:
            return descriptor
        os.close(descriptor)
    raise TrainingError(
        f"a lock must be a regular file, but {path} is a link, a folder or a special file. Nothing was written. "
        f"Remove it and start again. {what_else}"
    )


def _take(
    file: IO[str], path: Path, folder: Path, *, log: Callable[[str], object], what_else: str, has_system_lock: bool
) -> None:
    """Write the name of this process into the file, unless it names another process that may run."""
    found = _read(file)
    if found is not None:
        alive = found.is_alive
        if alive is None:
            raise FolderInUseError(
                f"{folder} may be in use: {found} locked it, and {socket.gethostname()} cannot check whether that "
                f"process still runs. If it has ended, delete {path} and start again. {what_else}"
            )
        # This process holds the lock of the system, so no other process of this host does.
        if alive and not has_system_lock:
            raise _in_use(folder, found, what_else)
        log(f"{folder} was locked by {found}, which ended without unlocking it. This process takes the lock over.")
    mine = Owner.here()
    file.seek(0)
    file.truncate()
    file.write(json.dumps(asdict(mine)) + "\n")
    file.flush()
    if not has_system_lock:
        time.sleep(_SETTLE)
        if (now := _read(file)) != mine:
            raise _in_use(folder, now, what_else)


def _in_use(folder: Path, owner: Owner | None, what_else: str) -> FolderInUseError:
    who = str(owner) if owner else "another process, which has not written its name yet"
    return FolderInUseError(f"{folder} is in use: {who}. Wait for it, or stop it. {what_else}")


def _read(file: IO[str]) -> Owner | None:
    """Return the owner in the file; None if there is none, or the file is incomplete."""
    file.seek(0)
    try:
        return Owner(**json.loads(file.read()))
    except (ValueError, TypeError, OSError):
        return None


def _user() -> str:
    try:
        return getpass.getuser()
    except (OSError, KeyError, ImportError):  # an id without a name, as in many containers
        return str(os.getuid()) if hasattr(os, "getuid") else "unknown"


def _is_running(pid: int) -> bool:
    """Return whether the process exists and can still write."""
    stat = _linux_stat(pid)
    if stat is not None:
        return stat[0] not in ("Z", "X")
    return bool(import_string("psutil:pid_exists")(pid))


def _started(pid: int) -> str | None:
    """Return the start of a process: on Linux in ticks since the boot, which no change of the clock moves."""
    stat = _linux_stat(pid)
    if stat is not None:
        return f"{boot_id()} {stat[19]}"
    try:
        return str(int(import_string("psutil:Process")(pid).create_time()))
    except import_string("psutil:Error"):
        return None


def _linux_stat(pid: int) -> list[str] | None:
    """Return the fields of ``/proc/PID/stat`` after the name, the state first."""
    try:
        return Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace").rpartition(") ")[2].split()
    except OSError:
        return None
