"""Pointers of Git LFS, which replace files that were not downloaded."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pathlib import Path

BEGINNING = b"version https://git-lfs.github.com/spec/"
WAY_OUT = "a Git LFS pointer and not the file itself. Run `git lfs pull` in its repository, or download the file again."


def is_pointer(data: bytes) -> bool:
    """Return whether a file that begins with ``data`` is a pointer."""
    return data.startswith(BEGINNING)


def is_pointer_file(path: Path) -> bool:
    """Return whether a file is a pointer; False if it cannot be read."""
    try:
        with path.open("rb") as file:
            return is_pointer(file.read(len(BEGINNING)))
    except (OSError, ValueError):
        return False
