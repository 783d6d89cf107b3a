"""Opening files from elsewhere: a FIFO would wait for its writer forever, and a device may have side effects."""

import errno
import os
import stat
from pathlib import Path
from typing import BinaryIO


class NotRegularError(OSError):
    """The error of ``open_regular`` for a FIFO, a device or a socket."""


def open_regular(path: Path) -> BinaryIO:
    """Open a regular file for reading its bytes, without waiting.

    Raises:
        NotRegularError: the path leads to a FIFO, a device or a socket.
        OSError: there is no such file, it is a folder, or it cannot be opened.
    """
    _check(os.stat(path), path)  # before opening, which has an effect on some devices
    file = open(path, "rb", opener=_without_waiting)
    try:
        _check(os.fstat(file.fileno()), path)  # again, because another process may have replaced it
    except BaseException:
        file.close()
        raise
    return file


def _without_waiting(path: str, flags: int) -> int:
    return os.open(path, flags | getattr(os, "O_NONBLOCK", 0))


def _check(found: os.stat_result, path: Path) -> None:
    # Opening a folder fails with the system's own error.
    if not stat.S_ISREG(found.st_mode) and not stat.S_ISDIR(found.st_mode):
        kinds = {stat.S_IFIFO: "a FIFO", stat.S_IFSOCK: "a socket"}
        kind = kinds.get(stat.S_IFMT(found.st_mode), "a device")
        raise NotRegularError(errno.EINVAL, f"it is {kind}, not a regular file", str(path))
