"""API keys of clients. They are compared in constant time, and no message contains them."""

from __future__ import annotations

import hashlib
import hmac
import os
import re
from typing import TYPE_CHECKING

from finetune.errors import LaunchError, RequestError, brief
from finetune.launch.listening import names_loopback

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path

VARIABLE = "FINETUNE_API_KEYS"
_KEY = re.compile(r"[!-~]{16,256}")


def read_keys(file: Path | None, environ: Mapping[str, str] = os.environ) -> tuple[str, ...]:
    """Return the accepted API keys; an empty tuple if clients need none.

    Args:
        file: the file with one key per line; empty lines and lines that begin with ``#`` are ignored. None to read
            ``environ``.
        environ: the environment, whose ``$FINETUNE_API_KEYS`` holds keys, separated by spaces or commas, if there
            is no file.

    Raises:
        LaunchError: the file cannot be read, it holds no key, or a key is too short or has other characters.
    """
    if file is None:
        keys = [(f"${VARIABLE}, key {number}", key) for number, key in enumerate(_split(environ.get(VARIABLE, "")), 1)]
        if not keys and VARIABLE in environ:
            raise LaunchError(f"${VARIABLE} must hold at least one API key, got none. Add a key, or unset it.")
    else:
        keys = _of_file(file)
    for where, key in keys:
        if not _KEY.fullmatch(key):
            raise LaunchError(
                f"{where}: an API key must have 16 to 256 visible ASCII characters. Make one with: openssl rand -hex 32"
            )
    return tuple(key for _, key in keys)


def _split(text: str) -> list[str]:
    return text.replace(",", " ").split()


def _of_file(file: Path) -> list[tuple[str, str]]:
    try:
        lines = file.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise LaunchError(f"--api-key-file {file} cannot be read: {error}") from None
    keys = [
        (f"{file}, line {number}", key)
        for number, line in enumerate(lines, start=1)
        if (key := line.strip()) and not key.startswith("#")
    ]
    if not keys:
        raise LaunchError(f"--api-key-file {file} must hold at least one API key, got none. Write one key per line.")
    return keys


class Keys:
    """The check of API keys.

    Args:
        keys: the accepted keys; if there are none, any client of this machine may ask.
    """

    def __init__(self, keys: Sequence[str]):
        self._digests = [_digest(key.encode()) for key in keys]

    def check(self, authorization: bytes | None, *, host: str) -> str | None:
        """Check the ``Authorization`` header of a request or, if there are no keys, its ``Host``.

        Returns:
            A public name of the key, derived from its digest; None if there are no keys.

        Raises:
            RequestError: the request has no key or an unknown key, or its ``Host`` is not this machine.
        """
        if not self._digests:
            if not names_loopback(host):
                message = (
                    f"A server without API keys answers for Host localhost only, got {brief(host, 60)}. Use localhost, "
                    "or start the server with API keys."
                )
                raise RequestError(message, status=403, code="unknown_host")
            return None
        scheme, _, key = (authorization or b"").partition(b" ")
        if scheme.lower() != b"bearer" or not key:
            message = "The request must have an API key, got none. Send it in a header: Authorization: Bearer KEY"
            raise RequestError(message, status=401, code="missing_api_key")
        given = _digest(key.strip())
        # Compare with all keys, so that the time does not depend on which one fits.
        if not sum([hmac.compare_digest(given, known) for known in self._digests]):
            message = "The server does not know this API key. Check it, or ask the operator for a key."
            raise RequestError(message, status=401, code="invalid_api_key")
        return given.hex()[:16]


def _digest(key: bytes) -> bytes:
    return hashlib.sha256(key).digest()
