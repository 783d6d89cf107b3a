"""Errors of the operating system as errors of this package, with advice for each."""

import errno
from pathlib import Path

from finetune.core.regular_file import NotRegularError
from finetune.errors import StoreError


def explain(error: OSError, path: Path | str, *, verb: str, elsewhere: str = "") -> StoreError:
    """Return an error with the action that the system refused, its path, and advice.

    Args:
        error: the error of the system.
        path: the file, folder or key concerned.
        verb: the action that failed, such as ``"write"``.
        elsewhere: the option that chooses another folder, such as ``" (--registry)"``; empty for none.
    """
    advice = {
        errno.ENOSPC: f"The disk is full: free some space there, or choose another folder{elsewhere}.",
        errno.EDQUOT: f"Your quota is used up: delete something, or choose another folder{elsewhere}.",
        errno.EROFS: f"It is mounted read-only: choose another folder{elsewhere}.",
        errno.EACCES: f"Ask its owner for access, or choose another folder{elsewhere}.",
        errno.EPERM: f"Ask its owner for access, or choose another folder{elsewhere}.",
        errno.ENOTDIR: f"A folder is needed, but a file has its path: choose another folder{elsewhere}.",
        errno.EEXIST: f"A folder is needed, but a file has its path: choose another folder{elsewhere}.",
    }.get(error.errno or 0, "Check that the disk is connected and healthy, then try again.")
    if isinstance(error, NotRegularError):
        advice = f"Remove it, or put the right file in its place{elsewhere}."
    explained = StoreError(f"cannot {verb} {path}: {error.strerror or error}. {advice}")
    explained.errno = error.errno
    return explained
