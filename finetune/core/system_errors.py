"""Errors of the system as errors of ours, with what to do about each."""

import errno
from pathlib import Path

from finetune.core.regular_file import NotRegularError
from finetune.errors import StoreError


def explain(error: OSError, path: Path | str, *, verb: str, elsewhere: str = "") -> StoreError:
    """Return an error that says what the system refused, where, and what to do about it.

    Args:
        error: the error of the system.
        path: the file, folder or key concerned.
        verb: the action that failed, such as ``"write"``.
        elsewhere: a hint how to choose another folder, such as ``" (--registry)"``; empty for none.
    """
    advice = {
        errno.ENOSPC: f"The disk is full: free some space there, or choose another folder{elsewhere}.",
        errno.EDQUOT: f"Your quota is used up: delete something, or choose another folder{elsewhere}.",
        errno.EROFS: f"It is mounted read-only: choose another folder{elsewhere}.",
        errno.EACCES: f"Ask its owner for access, or choose another folder{elsewhere}.",
        errno.EPERM: f"Ask its owner for access, or choose another folder{elsewhere}.",
        errno.ENOTDIR: f"A file stands where a folder is needed: choose another folder{elsewhere}.",
        errno.EEXIST: f"A file stands where a folder is needed: choose another folder{elsewhere}.",
    }.get(error.errno or 0, "Check that the disk is connected and healthy, then try again.")
    if isinstance(error, NotRegularError):
        advice = f"Remove it, or put the right file in its place{elsewhere}."
    explained = StoreError(f"cannot {verb} {path}: {error.strerror or error}. {advice}")
    explained.errno = error.errno
    return explained
