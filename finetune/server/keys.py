"""API keys of clients. They are compared in constant time, and stand in no message."""

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
    """Return the API keys that are accepted; none where everybody may ask.

    Args:
        file: the file with one key a line, without empty lines and those that begin with ``#``; None for ``environ``.
        environ: the environment, whose ``$FINETUNE_API_KEYS`` holds keys, separated by spaces or commas, if there
            is no file.

    Raises:
        LaunchError: there is no such file, no key in it, or one that is easily guessed.
    """
    if file is None:
        keys = [(f"${VARIABLE}, key {number}", key) for number, key in enumerate(_split(environ.get(VARIABLE, "")), 1)]
        if not keys and VARIABLE in environ:
            raise LaunchError(f"${VARIABLE} holds no key. Put one in, or unset it to let everybody ask.")
    else:
        keys = _of_file(file)
    for where, key in keys:
        if not _KEY.fullmatch(key):
            raise LaunchError(
                f"{where}: an API key has 16 to 256 visible ASCII characters. Make one with: openssl rand -hex 32"
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
        raise LaunchError(f"--api-key-file {file} holds no key: write one a line.")
    return keys


class Keys:
    """The check of API keys.

    Args:
        keys: the known keys; where there are none, everybody on this machine may ask.
    """

    def __init__(self, keys: Sequence[str]):
        self._digests = [_digest(key.encode()) for key in keys]

    def check(self, authorization: bytes | None, *, host: str) -> str | None:
        """Let a request through by its ``Authorization`` header, or where there are no keys by its ``Host``.

        Returns:
            A public name of the key, derived from its digest; None where there are no keys.

        Raises:
            RequestError: it has no key, or an unknown one, or was sent here under the name of another host.
        """
        if not self._digests:
            if not names_loopback(host):
                message = f"Without API keys, requests are answered for localhost, not for {brief(host, 60)}."
                raise RequestError(message, status=403, code="unknown_host")
            return None
        scheme, _, key = (authorization or b"").partition(b" ")
        if scheme.lower() != b"bearer" or not key:
            message = "There is no API key. Send it in a header: Authorization: Bearer KEY"
            raise RequestError(message, status=401, code="missing_api_key")
        given = _digest(key.strip())
        # All of them are compared, whichever fits.
        if not sum([hmac.compare_digest(given, known) for known in self._digests]):
            raise RequestError("This API key is not known here.", status=401, code="invalid_api_key")
        return given.hex()[:16]


def _digest(key: bytes) -> bytes:
    return hashlib.sha256(key).digest()
