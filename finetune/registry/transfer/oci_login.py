"""The login at an OCI registry: a password from ``docker login``, or a token for that password.

Source: https://distribution.github.io/distribution/spec/auth/token/. Passwords in a credential helper are not found.
"""

import base64
import binascii
import json
import os
import re
from pathlib import Path

import httpx2

from finetune.errors import StoreError

LOOPBACK = re.compile(r"(localhost|127(\.\d{1,3}){3}|\[::1\])(:\d{1,5})?")
_CHALLENGE = re.compile(r'([a-z]+)="([^"]*)"')


def answer_challenge(client: httpx2.Client, host: str, challenge: str) -> str | None:
    """Return the value of the header ``Authorization``; None when the challenge cannot be answered.

    Args:
        client: the client that fetches a token.
        host: the host of the registry.
        challenge: the value of its header ``WWW-Authenticate``.

    Raises:
        StoreError: the password file is damaged, or the registry names an unsafe address for the token.
    """
    scheme, _, rest = challenge.partition(" ")
    password = _password(host)
    if scheme.lower() == "basic":
        return None if password is None else f"Basic {password}"
    if scheme.lower() != "bearer":
        return None
    asked = dict(_CHALLENGE.findall(rest))
    url = httpx2.URL(asked.get("realm", ""))
    if url.scheme != "https" and not (url.scheme == "http" and LOOPBACK.fullmatch(url.netloc.decode())):
        raise StoreError(f"{host}: the address for a token must be HTTPS, got {str(url)!r}. The password was not sent.")
    headers = {} if password is None else {"Authorization": f"Basic {password}"}
    parameters = {name: asked[name] for name in ("service", "scope") if name in asked}
    answer = client.get(url.copy_merge_params(parameters), headers=headers, follow_redirects=False)
    try:
        response = answer.json() if answer.is_success else {}
        token = response.get("token") or response.get("access_token")
    except (ValueError, AttributeError):
        token = None
    return f"Bearer {token}" if isinstance(token, str) and token.isprintable() else None


def _password(host: str) -> str | None:
    """Return ``user:password`` in base64, as ``docker login`` wrote it for a host."""
    path = Path(os.environ.get("DOCKER_CONFIG") or Path.home() / ".docker", "config.json")
    try:
        auth = json.loads(path.read_bytes())["auths"][host]["auth"]
        base64.b64decode(auth, validate=True)
    except (FileNotFoundError, NotADirectoryError, KeyError):
        return None
    except (OSError, ValueError, TypeError, binascii.Error) as error:
        raise StoreError(
            f"{path}: cannot read the password for {host}: {error}. Log in again with `docker login {host}`."
        ) from None
    return str(auth)
