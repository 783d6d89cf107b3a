"""Opening files from elsewhere: a FIFO would wait for its writer for ever, and a device may do anything."""

import errno
import os
import stat
from pathlib import Path
from typing import BinaryIO


class NotRegularError(OSError):
    """The signal of ``open_regular`` for a FIFO, a device or a socket."""


def open_regular(path: Path) -> BinaryIO:
    """Open a regular file for reading its bytes, without waiting for anything.

    Raises:
        NotRegularError: the path leads to a FIFO, a device or a socket.
        OSError: there is no such file, it is a folder, or it cannot be opened.
    """
    _check(os.stat(path), path)  # before it is opened, which some devices notice
    file = open(path, "rb", opener=_without_waiting)
    try:
        _check(os.fstat(file.fileno()), path)  # again, for it may have been replaced
    except BaseException:
        file.close()
        raise
    return file


def _without_waiting(path: str, flags: int) -> int:
    return os.open(path, flags | getattr(os, "O_NONBLOCK", 0))


def _check(found: os.stat_result, path: Path) -> None:
    # Opening a folder fails by itself, with the system's own words.
    if not stat.S_ISREG(found.st_mode) and not stat.S_ISDIR(found.st_mode):
        kinds = {stat.S_IFIFO: "a FIFO", stat.S_IFSOCK: "a socket"}
        kind = kinds.get(stat.S_IFMT(found.st_mode), "a device")
        raise NotRegularError(errno.EINVAL, f"it is {kind}, not a regular file", str(path))
