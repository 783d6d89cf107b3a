"""The users who can change a file: its owner, and all users who may write it or a folder of its path."""

import errno
import os
import shlex
import stat
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

_MOST_LINKS = 40  # as Linux has it
_ELSEWHERE = "put it in a folder of your own, or on a read-only mount"
_WRITE_BITS = {"g": stat.S_IWGRP, "o": stat.S_IWOTH}


def user_folder() -> Path:
    """Return ``~/.finetune``, and make it where it is missing: with mode 0755 at most, for any umask.

    The first command of any kind makes it. It holds the keys and the trust policy.
    """
    folder = Path.home() / ".finetune"
    with suppress(OSError):  # the code that writes below it reports the error
        folder.mkdir(mode=0o755)
    return folder


def changeable_by_others(path: Path) -> str | None:
    """Return the ways in which another user could change a file, with the commands against them; None if none could.

    The check follows the path as the system does, from the root, through links to their targets. The user or root must
    own each part, and no other user may write it. A group counts as another user, even the user's own group: an
    administrator can add members. All users may write a sticky folder, such as ``/tmp``, because they cannot replace
    the files of others there. Modes on a read-only mount do not count: Kubernetes mounts files with modes that allow
    all users to write. Windows has no such modes, so the check passes there.

    Args:
        path: the path of the file or folder.

    Raises:
        OSError: a part of the path is missing or cannot be read.
    """
    if os.name == "nt":
        return None
    problems = [problem for place, found in _way_to(path) if (problem := _problem(place, found))]
    return "; ".join(dict.fromkeys(problems)) or None


def _way_to(path: Path) -> Iterator[tuple[Path, os.stat_result]]:
    """Yield every folder, link and file of a path, the path itself last."""
    place = Path("/")
    yield place, os.lstat(place)
    links, left = 0, [*reversed(path.absolute().parts[1:])]
    while left:
        if (name := left.pop()) == "..":
            place = place.parent  # ``place`` is never a link, so its parent is the folder that holds it
            continue
        found = os.lstat(place / name)
        yield place / name, found
        if not stat.S_ISLNK(found.st_mode):
            place = place / name
            continue
        if (links := links + 1) > _MOST_LINKS:
            raise OSError(errno.ELOOP, os.strerror(errno.ELOOP), str(path))
        target = Path(os.readlink(place / name))
        if target.is_absolute():
            place = Path("/")
        left.extend(part for part in reversed(target.parts) if part != target.anchor)


def _problem(place: Path, found: os.stat_result) -> str | None:
    shown, me = shlex.quote(str(place)), os.geteuid()
    is_link, is_folder = stat.S_ISLNK(found.st_mode), stat.S_ISDIR(found.st_mode)
    if found.st_uid not in (0, me):
        chown = f"chown {'-h ' if is_link else ''}{_user(me)} {shown}"
        return f"{place} belongs to {_user(found.st_uid)}: {chown if me == 0 else _ELSEWHERE}"
    writers = "".join(who for who, bit in _WRITE_BITS.items() if found.st_mode & bit)
    if is_link or not writers or (is_folder and found.st_mode & stat.S_ISVTX):
        return None
    if os.statvfs(place).f_flag & os.ST_RDONLY:
        return None
    who = "all users" if "o" in writers else "its group"
    advice = f"chmod {writers}-w {shown}" if me in (0, found.st_uid) else _ELSEWHERE
    return f"{who} can write {place} (mode {stat.S_IMODE(found.st_mode):04o}): {advice}"


def _user(uid: int) -> str:
    import pwd  # not on Windows

    try:
        return pwd.getpwuid(uid).pw_name
    except KeyError:  # in a container, most users of the machine have no name
        return str(uid)
