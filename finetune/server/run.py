"""The server process: it loads the adapters, listens, and answers until it is asked to stop."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import sys
import threading
import time
from typing import TYPE_CHECKING

import uvicorn

from finetune.errors import ModelError
from finetune.server.catalog import BASE
from finetune.server.connections import BACKLOG, IDLE_SECONDS, Connections, QuietErrors, protocol_of
from finetune.server.http_api import make_app
from finetune.server.service import Service

if TYPE_CHECKING:
    import socket
    from collections.abc import Iterator, Sequence

    from finetune.server.settings import Settings
    from finetune.serving.vision_language_model import VisionLanguageModel

_LAST_SECONDS = 1.0  # that clients have to read the end of their answer
_SIGNALS = (signal.SIGINT, signal.SIGTERM)


def serve(
    vlm: VisionLanguageModel, refs: Sequence[str], settings: Settings, listener: socket.socket, *, begun: float
) -> int:
    """Answer requests until a signal asks to stop; running requests may end first.

    Args:
        vlm: the model.
        refs: the references of the adapters that clients may always ask; they are loaded first.
        settings: the bounds of the server.
        listener: the bound socket.
        begun: the time of the start, of ``time.monotonic``.

    Returns:
        128 plus the number of the signal.

    Raises:
        ModelError: the base is not generative.
        FinetuneError: an adapter cannot be loaded.
    """
    if (architecture := vlm.base.family.architecture) != "generative":
        raise ModelError(
            f"The architecture of the served base must be generative, got {architecture} ({vlm.base.path}). Choose a "
            "base that generates text."
        )
    for ref in refs:
        vlm.add(ref)
    server = Server(Service(vlm, refs, settings), _introduction(vlm, refs, settings, listener), begun=begun)
    asyncio.run(server.serve(sockets=[listener]))
    assert server.signum is not None
    return _ended(128 + server.signum)


class Server(uvicorn.Server):
    """A uvicorn server that prints where it listens; the first signal lets requests end, the second cuts them off.

    Args:
        service: the service that answers.
        introduction: the text to print when it listens.
        begun: the time of the start, of ``time.monotonic``.
    """

    def __init__(self, service: Service, introduction: str, *, begun: float):
        super().__init__(
            uvicorn.Config(
                make_app(service),
                http=protocol_of(Connections(service.settings)),
                ws="none",
                log_config=None,
                log_level="error",  # warnings about invalid HTTP would fill the log
                access_log=False,
                server_header=False,
                proxy_headers=False,  # a client could write any address there
                backlog=BACKLOG,
                timeout_keep_alive=IDLE_SECONDS,
            )
        )
        self.signum: int | None = None
        self._service, self._introduction, self._begun = service, introduction, begun
        self._loop: asyncio.AbstractEventLoop | None = None  # set once the server stops

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Begin to listen."""
        asyncio.get_running_loop().set_exception_handler(QuietErrors())
        await super().startup(sockets)
        seconds = time.monotonic() - self._begun
        print(f"{self._introduction}; ready after {seconds:.1f} s; Ctrl-C stops", flush=True)

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Stop when all requests have ended, or when their time is over."""
        self._loop = asyncio.get_running_loop()
        seconds = self._service.settings.stop_seconds
        if running := len(self.server_state.tasks):
            message = f"stopping: {running} requests may end within {seconds:g} s; a second signal stops at once"
            print(message, file=sys.stderr, flush=True)
        late = self._loop.call_later(seconds, self._service.cut)
        later = self._loop.call_later(seconds + _LAST_SECONDS, self._abort)
        await super().shutdown(sockets)
        late.cancel()
        later.cancel()
        print("stopped", file=sys.stderr)

    def _abort(self) -> None:
        """Close the connections of clients that do not read the end of their answer."""
        for connection in list(self.server_state.connections):
            connection.transport.abort()

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Handle the signals that ask to stop; an ignored signal, as under nohup, stays ignored."""
        before = {}
        if threading.current_thread() is threading.main_thread():
            before = {signum: signal.getsignal(signum) for signum in _SIGNALS}
        try:
            for signum, handler in before.items():
                if handler is not signal.SIG_IGN:
                    signal.signal(signum, self.stop)
            yield
        finally:
            for signum, handler in before.items():
                signal.signal(signum, handler)

    def stop(self, signum: int, _frame: object = None) -> None:
        """Take no more requests and let running ones end; on the second call, cut them off."""
        if self.signum is not None and self._loop is not None:
            self._loop.call_soon_threadsafe(self._service.cut)
            self._loop.call_soon_threadsafe(self._loop.call_later, _LAST_SECONDS, self._abort)
        self.signum = self.signum or signum
        self._service.is_stopping = self.should_exit = True


def _ended(code: int) -> int:
    """Return the exit code; end the process here if a thread still prepares a request or loads an adapter.

    The interpreter would wait for some of these threads, and stop others inside a library, which may abort.
    """
    end = time.monotonic() + _LAST_SECONDS
    for thread in threading.enumerate():
        is_ours = thread.name.startswith("finetune-")
        if thread is not threading.current_thread() and (is_ours or not thread.daemon):
            thread.join(max(0.0, end - time.monotonic()))
            if thread.is_alive():
                sys.stdout.flush()
                sys.stderr.flush()
                os._exit(code)
    return code


def _introduction(vlm: VisionLanguageModel, refs: Sequence[str], settings: Settings, listener: socket.socket) -> str:
    """Return the text to print when the server listens."""
    host, port = listener.getsockname()[:2]
    where = f"[{host}]" if ":" in host else host
    base = vlm.base
    model = f"{base.path} ({base.family.model_type}, {str(vlm.model.dtype).removeprefix('torch.')}, {vlm.model.device})"
    on_demand = f"; on demand: {', '.join(settings.allow)}" if settings.allow else ""
    keys = f"API keys: {len(settings.api_keys)}" if settings.api_keys else "no API key needed"
    return (
        f"serving on http://{where}:{port}/v1\n  base: {model}\n  models: {', '.join([BASE, *refs])}{on_demand}\n"
        f"  {keys}"
    )
