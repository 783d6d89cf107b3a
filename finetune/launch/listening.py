"""The socket of a server, bound before a model is loaded, and checks of the machines that can reach it."""

from __future__ import annotations

import socket
from contextlib import contextmanager
from ipaddress import ip_address
from typing import TYPE_CHECKING, Any

from finetune.errors import LaunchError

if TYPE_CHECKING:
    from collections.abc import Iterator


@contextmanager
def listening(host: str, port: int) -> Iterator[socket.socket]:
    """Yield a bound socket; nothing answers requests yet.

    Args:
        host: the name or address of this machine.
        port: the number of the port; 0 for a free one.

    Raises:
        LaunchError: the socket cannot be bound.
    """
    if not 0 <= port < 2**16:
        raise LaunchError(f"--port must be a number from 0 to {2**16 - 1}, got {port}")
    family, kind, protocol, _, address = _resolve(host, port)
    with socket.socket(family, kind, protocol) as listener:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            listener.bind(address)
        except OSError as error:
            raise LaunchError(
                f"cannot listen on {host}, port {port}: {error.strerror}. Choose another --port."
            ) from None
        yield listener


def is_loopback(host: str) -> bool:
    """Return whether only this machine can reach a server that listens on ``host``.

    Raises:
        LaunchError: ``host`` is no address of this machine.
    """
    return ip_address(str(_resolve(host, 0)[4][0])).is_loopback


def names_loopback(header: str) -> bool:
    """Return whether a request's ``Host`` header is localhost or a loopback address.

    An attacker can point another name at this machine, so that a browser here sends his requests (DNS rebinding).
    """
    name = header.strip().rpartition("]")[0].lstrip("[") if header.strip().startswith("[") else header.partition(":")[0]
    if name.strip().lower() == "localhost":
        return True
    try:
        return ip_address(name.strip()).is_loopback
    except ValueError:
        return False


def _resolve(host: str, port: int) -> tuple[Any, ...]:
    try:
        return socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)[0]
    except OSError as error:
        raise LaunchError(
            f"--host must be an address of this machine, got {host} ({error.strerror}). "
            "Use 127.0.0.1 for this machine alone."
        ) from None
