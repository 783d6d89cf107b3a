"""The files of keys: their paths, their permissions, and their passphrase."""

import getpass
import os
import stat
import sys
from pathlib import Path

from finetune.core.file_owner import changeable_by_others, user_folder
from finetune.core.regular_file import open_regular
from finetune.core.system_errors import explain
from finetune.errors import TrustError

KEY_VARIABLE = "FINETUNE_SIGNING_KEY"
PASSPHRASE_VARIABLE = "FINETUNE_SIGNING_PASSPHRASE"
MAX_KEY_BYTES = 64 * 1024


def public_path(path: Path) -> Path:
    """Return the path of the public key that belongs to a private one."""
    return path.with_name(f"{path.name}.pub")


def default_key_path(name: str) -> Path:
    """Return the default path of a new key."""
    return user_folder() / "keys" / f"{name}.pem"


def make_folder(folder: Path, *, mode: int) -> None:
    """Make a folder and its parents that only their owner can write, with any umask."""
    if not folder.is_dir():
        make_folder(folder.parent, mode=0o755)
        folder.mkdir(mode=mode, exist_ok=True)


def create_file(path: Path, data: bytes, *, mode: int) -> None:
    """Create the file of a key; refuse to overwrite one."""
    try:
        file = open(path, "xb", opener=lambda name, flags: os.open(name, flags, mode))
    except FileExistsError:
        raise TrustError(f"{path} exists, and a key is never overwritten. Choose another file (--out).") from None
    try:
        with file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
    except BaseException:
        path.unlink()
        raise


def read_private(path: Path) -> bytes:
    """Return the bytes of a private key that only its owner can read or replace."""
    try:
        with open_regular(path) as file:
            mode = os.fstat(file.fileno()).st_mode
            if os.name != "nt" and mode & 0o077:
                raise TrustError(
                    f"{path}: others on this machine can read this private key (mode {stat.S_IMODE(mode):04o}). "
                    f"If no other user did, run `chmod 600 {path}`. Else make a new key and revoke this one."
                )
            if problem := changeable_by_others(path):
                raise TrustError(f"{path}: others on this machine can replace this private key: {problem}")
            pem = file.read(MAX_KEY_BYTES + 1)
    except FileNotFoundError:
        raise TrustError(
            f"{path}: there is no such signing key (--sign-with or {KEY_VARIABLE}). Make one with `finetune registry "
            "keygen`."
        ) from None
    except OSError as error:
        raise explain(error, path, verb="read", elsewhere=f" (--sign-with or {KEY_VARIABLE})") from error
    if len(pem) > MAX_KEY_BYTES:
        raise TrustError(f"{path}: a signing key must have at most {MAX_KEY_BYTES} bytes, got more")
    return pem


def asks_for_passphrase(path: str | Path) -> bool:
    """Return whether the user must type the passphrase to open a key.

    Raises:
        TrustError: there is no such file, or others can read or change it.
        StoreError: the file cannot be read.
    """
    locked = read_private(Path(path).expanduser()).startswith(b"-----BEGIN ENCRYPTED PRIVATE KEY-----")
    return locked and not os.environ.get(PASSPHRASE_VARIABLE) and sys.stdin.isatty()


def read_passphrase(path: Path) -> bytes:
    """Return the passphrase of a private key, from the environment or the terminal."""
    if passphrase := os.environ.get(PASSPHRASE_VARIABLE):
        return passphrase.encode()
    if not sys.stdin.isatty():
        raise TrustError(
            f"{path}: the key is encrypted. Give its passphrase in {PASSPHRASE_VARIABLE}, or use a terminal."
        )
    return getpass.getpass(f"passphrase of {path}: ").encode()
