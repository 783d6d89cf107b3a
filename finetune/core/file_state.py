"""The state of a file as a key, which shows a program that it need not read the file again.

The kernel sets the time of the last change of an inode (ctime). A copy that keeps times, as of ``cp -p`` and
``rsync --times``, cannot set it. A disk may change while the machine is off, so a state is valid for one boot only.

Two writes within one tick of a clock have the same times. So a fresh state proves nothing: a file that is read then
must be read again ("racily clean" in git's index).
"""

import os
import sys
import time
from functools import cache
from pathlib import Path

_LOCAL = ("bcachefs", "btrfs", "ext2", "ext3", "ext4", "f2fs", "jfs", "overlay", "ramfs", "tmpfs", "xfs", "zfs")
_SHARED = ("beegfs", "ceph", "gfs2", "gpfs", "lustre", "nfs", "nfs4", "ocfs2", "virtiofs")
_LOCAL_SECONDS = 2.0
# Type of file system -> seconds without a write after which the state of a file is reliable. A server's clock may
# differ, and a client may cache times for a minute. Other types (FAT, FUSE, SMB) are never reliable: a copy may set
# what they report as the time of the last change.
_RESTS = {**dict.fromkeys(_LOCAL, _LOCAL_SECONDS), **dict.fromkeys(_SHARED, 600.0)}
_MOUNTS = Path("/proc/self/mountinfo")
_RESTS_BY_DEVICE: dict[int, float | None] = {}


def file_key(path: Path) -> str:
    """Return a key that changes when a file does, and with every boot; caches keep facts about the file by it.

    Raises:
        OSError: there is no such file.
        ValueError: there can be no such file.
    """
    resolved, stat = _found(path)
    return "\0".join([_state(resolved, stat), str(stat.st_dev), boot_id()])


def file_state(path: Path) -> str:
    """Return the resolved path of a file, its inode, its size, and the times of its last write and change.

    Raises:
        OSError: there is no such file.
        ValueError: there can be no such file.
    """
    return _state(*_found(path))


def _found(path: Path) -> tuple[Path, os.stat_result]:
    resolved = path.resolve()
    return resolved, resolved.stat()


def _state(resolved: Path, stat: os.stat_result) -> str:
    return "\0".join(map(str, (resolved, stat.st_ino, stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns)))


def is_settled(path: Path) -> bool:
    """Return whether each later write changes the key of a file: call it between ``file_key`` and reading.

    Raises:
        OSError: there is no such file.
        ValueError: there can be no such file.
    """
    stat = path.stat()
    rest = _rest_seconds(path, stat.st_dev)
    return rest is not None and max(stat.st_mtime_ns, stat.st_ctime_ns) + rest * 1e9 < time.time_ns()


@cache
def boot_id() -> str:
    """Return the id of this boot of a Linux machine; an empty text elsewhere."""
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
    except (OSError, ValueError):
        return ""


def _rest_seconds(path: Path, device: int) -> float | None:
    """Return the seconds without a write that a file needs; None if its state is never reliable."""
    if sys.platform == "win32":  # ctime is the time of creation there
        return None
    if device not in _RESTS_BY_DEVICE:
        kind = _file_system(path.resolve())
        _RESTS_BY_DEVICE[device] = _LOCAL_SECONDS if kind is None else _RESTS.get(kind)
    return _RESTS_BY_DEVICE[device]


def _file_system(path: Path) -> str | None:
    """Return the type of the file system that holds ``path``; None if the system does not list it."""
    try:
        lines = _MOUNTS.read_bytes().splitlines()
    except OSError:
        return None
    found, longest = "unknown", -1
    for line in lines:
        mount, _, source = line.partition(b" - ")
        point = os.fsdecode(mount.split()[4].decode("unicode_escape").encode("latin-1"))  # \040 stands for a space
        if len(point) >= longest and path.is_relative_to(point):
            found, longest = os.fsdecode(source.split()[0]), len(point)
    return found
