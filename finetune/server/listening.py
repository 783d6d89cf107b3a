"""The socket that a server listens on, taken before anything is loaded."""

from __future__ import annotations

import socket
from contextlib import contextmanager
from ipaddress import ip_address
from typing import TYPE_CHECKING

from finetune.errors import LaunchError
from finetune.server.keys import VARIABLE

if TYPE_CHECKING:
    from collections.abc import Iterator


@contextmanager
def listening(host: str, port: int, *, has_keys: bool) -> Iterator[socket.socket]:
    """Yields a socket that is bound; nobody is answered yet.

    Args:
        host: a name or address of this machine.
        port: 0 takes a free one.
        has_keys: whether requests need an API key.

    Raises:
        LaunchError: it cannot be bound, or others could ask without a key.
    """
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)[0]
    except OSError as error:
        raise LaunchError(f"--host {host}: {error.strerror}. Give an address of this machine.") from None
    family, kind, protocol, _, address = found
    if not has_keys and not ip_address(str(address[0])).is_loopback:
        raise LaunchError(
            f"--host {host} can be reached from other machines, and anybody there could ask. Give API keys: "
            f"--api-key-file FILE, or ${VARIABLE}."
        )
    with socket.socket(family, kind, protocol) as listener:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            listener.bind(address)
        except OSError as error:
            raise LaunchError(
                f"cannot listen on {host}, port {port}: {error.strerror}. Choose another --port."
            ) from None
        yield listener
