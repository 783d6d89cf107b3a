"""The limits on open connections, and on the time that one may take to send a request's head."""

from __future__ import annotations

import logging
import os
import time
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Any

import h11
from uvicorn.protocols.http.h11_impl import H11Protocol

if TYPE_CHECKING:
    import asyncio

    from finetune.server.settings import Settings

_log = logging.getLogger(__name__)
BACKLOG = 32  # connections that the system queues before the server accepts them
# How long a connection may stay idle between two requests. Many clients and proxies reuse theirs for 5 to 60 s. The
# server must wait longer: a request that arrives while it closes the connection is lost.
IDLE_SECONDS = 75
SPARE_FILES = BACKLOG + 64  # descriptors that connections leave for images, adapters and the registry
_SLICE = 16 * 1024  # bytes that are parsed at once
_QUIET_SECONDS = 60.0  # between two lines of the log about connections that cannot be accepted
_FULL = b"HTTP/1.1 503 Service Unavailable\r\nConnection: close\r\nRetry-After: 5\r\nContent-Length: 0\r\n\r\n"


class Connections:
    """The open connections of one server.

    Args:
        settings: the limits, in all and for one address, the seconds for a request's head, and those for which a
            client may read nothing of its answer.
    """

    def __init__(self, settings: Settings):
        self.head_seconds, self.read_seconds = settings.head_seconds, settings.body_seconds
        self.most = min(settings.max_connections, _free_files())
        self.most_of_one = min(settings.max_address_connections, self.most)
        self._open: Counter[str] = Counter()

    def enter(self, address: str) -> bool:
        """Count one more connection; return False if there is no room for it."""
        if self._open.total() >= self.most or self._open[address] >= self.most_of_one:
            return False
        self._open[address] += 1
        return True

    def leave(self, address: str) -> None:
        """Count one connection less."""
        self._open[address] -= 1
        if not self._open[address]:
            del self._open[address]


def protocol_of(connections: Connections) -> type[asyncio.Protocol]:
    """Return uvicorn's HTTP/1.1 protocol, bounded by ``connections``."""
    return type("Protocol", (_Protocol,), {"_shared": connections})


class _Protocol(H11Protocol):
    """A connection that the server closes if its next head takes too long, or if there is no room for it."""

    _shared: Connections
    _address: str | None = None  # once it is counted
    _timer: asyncio.TimerHandle | None = None  # until the head has come
    _writing: asyncio.TimerHandle | None = None  # until the client reads

    def __init__(self, *args: Any, **options: Any):
        super().__init__(*args, **options)
        self._unread = bytearray()

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Begin to wait for a head, or refuse the connection if there is no room for it."""
        super().connection_made(transport)
        address = self.client[0] if self.client else ""
        if not self._shared.enter(address):
            transport.write(_FULL)
            transport.close()
            return
        self._address = address
        self._wait()

    def data_received(self, data: bytes) -> None:
        """Read the data in slices, and let other connections have their turn between them.

        A body in chunks of one byte takes half a second to parse for each 256 kB that the system hands over.
        """
        is_read = bool(self._unread)
        self._unread += data
        if not is_read:
            self._read()

    def _read(self) -> None:
        if self.transport.is_closing():
            self._unread.clear()
            return
        data = bytes(self._unread[:_SLICE])
        try:
            super().data_received(data)
        except Exception as error:  # nothing else closes a connection whose later slice fails
            self._unread.clear()
            self.transport.abort()
            if isinstance(error, h11.LocalProtocolError):  # uvicorn answers invalid bytes after a complete answer
                return
            raise
        del self._unread[:_SLICE]
        if self._unread:
            self.transport.pause_reading()
            self.loop.call_soon(self._read)
        elif not self.flow.read_paused:
            self.transport.resume_reading()
        if self.cycle is not None and not self.cycle.response_complete:
            self._wait_no_more()
        elif self.conn.their_state is h11.IDLE and not self.conn.trailing_data[0]:  # the rest of a refused body came
            self._wait_no_more()
            close = self.timeout_keep_alive_handler
            self.timeout_keep_alive_task = self.loop.call_later(self.timeout_keep_alive, close)
        elif self._timer is None:
            self._wait()

    def on_response_complete(self) -> None:
        """Wait for the rest of a head that began before the answer was complete."""
        super().on_response_complete()
        if self.conn.their_state is h11.IDLE and self.conn.trailing_data[0] and self._timer is None:
            self._wait()

    def connection_lost(self, exc: Exception | None) -> None:
        """Count the connection as closed."""
        self._wait_no_more()
        self._writes()
        self._unset_keepalive_if_required()  # uvicorn does so only without an error
        if self._address is not None:
            self._shared.leave(self._address)
            self._address = None
        super().connection_lost(exc)

    def pause_writing(self) -> None:
        """Abort the connection later if the client still reads nothing."""
        super().pause_writing()
        self._writing = self.loop.call_later(self._shared.read_seconds, self.transport.abort)

    def resume_writing(self) -> None:
        """Continue with a client that reads again."""
        self._writes()
        super().resume_writing()

    def _writes(self) -> None:
        if self._writing is not None:
            self._writing.cancel()
            self._writing = None

    def _wait(self) -> None:
        self._timer = self.loop.call_later(self._shared.head_seconds, self.transport.abort)

    def _wait_no_more(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None


class QuietErrors:
    """An exception handler of an event loop that logs failures to accept connections only once a minute."""

    def __init__(self) -> None:
        self._logged_at = float("-inf")

    def __call__(self, loop: asyncio.AbstractEventLoop, context: dict[str, Any]) -> None:
        """Log one error."""
        if "accept" not in str(context.get("message")):
            loop.default_exception_handler(context)
        elif time.monotonic() - self._logged_at > _QUIET_SECONDS:
            self._logged_at = time.monotonic()
            _log.warning("the server cannot accept connections: %s", context.get("exception"))


def _free_files() -> int:
    """Return the number of file descriptors that connections may take."""
    try:
        import resource
    except ImportError:  # Windows
        return 10_000
    limit, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    if limit == resource.RLIM_INFINITY:
        return 1_000_000
    folder = Path("/dev/fd")
    used = len(os.listdir(folder)) if folder.is_dir() else 0
    return max(1, limit - used - SPARE_FILES)
