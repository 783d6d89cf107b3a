"""The users who can change a file: its owner, and everybody who may write it or a folder on the way to it."""

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
    """Return ``~/.finetune``, and make it where it is missing: with mode 0755 at most, whatever the umask is.

    The first command of any kind makes it, and keys and the trust policy lie in it.
    """
    folder = Path.home() / ".finetune"
    with suppress(OSError):  # whoever writes below it says so
        folder.mkdir(mode=0o755)
    return folder


def changeable_by_others(path: Path) -> str | None:
    """Return the ways in which another user could change a file, with the commands against them; None if none could.

    The way to the file is walked as the system walks it, from the root, through links to their targets. The user and
    root must own all of it, and nobody else may write any of it. A group counts as somebody else, also a user's own:
    whoever administers the machine can add members. A sticky folder, such as ``/tmp``, may be written by everybody,
    because nobody can replace what others own there. On a read-only mount modes say nothing: Kubernetes mounts what
    everybody could write. On Windows, which has no such modes, nothing is checked.

    Args:
        path: the path of the file or folder.

    Raises:
        OSError: something on the way is missing, or cannot be looked at.
    """
    if os.name == "nt":
        return None
    problems = [problem for place, found in _way_to(path) if (problem := _problem(place, found))]
    return "; ".join(dict.fromkeys(problems)) or None


def _way_to(path: Path) -> Iterator[tuple[Path, os.stat_result]]:
    """Yield every folder, link and file on the way to a path, the path itself last."""
    place = Path("/")
    yield place, os.lstat(place)
    links, left = 0, [*reversed(path.absolute().parts[1:])]
    while left:
        if (name := left.pop()) == "..":
            place = place.parent  # no link is ever a place, so this is the folder that holds it
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
    who = "everybody" if "o" in writers else "its group"
    advice = f"chmod {writers}-w {shown}" if me in (0, found.st_uid) else _ELSEWHERE
    return f"{who} can write {place} (mode {stat.S_IMODE(found.st_mode):04o}): {advice}"


def _user(uid: int) -> str:
    import pwd  # which Windows does not have

    try:
        return pwd.getpwuid(uid).pw_name
    except KeyError:  # in a container, most users of the machine have no name
        return str(uid)
