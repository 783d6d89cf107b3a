"""From a base and its adapters to a server that listens, until it is asked to stop."""

from __future__ import annotations

import asyncio
import contextlib
import signal
import sys
from typing import TYPE_CHECKING

import uvicorn

from finetune.errors import ModelError
from finetune.server.app import make_app
from finetune.server.catalog import BASE
from finetune.server.service import Service

if TYPE_CHECKING:
    import socket
    from collections.abc import Iterator, Sequence

    from finetune.server.settings import Settings
    from finetune.serving.app import VisionLanguageModel

_SIGNALS = (signal.SIGINT, signal.SIGTERM)


def serve(vlm: VisionLanguageModel, refs: Sequence[str], settings: Settings, listener: socket.socket) -> int:
    """Answers requests until a signal asks to stop; those that run may end first.

    Args:
        vlm: the model.
        refs: adapters that may be asked; they are loaded first.
        settings: bounds.
        listener: is bound.

    Returns:
        128 and the number of the signal.

    Raises:
        ModelError: the base writes no text.
        FinetuneError: an adapter cannot be loaded.
    """
    if vlm.base.family.kind != "generative":
        raise ModelError(f"{vlm.base.path} writes no text, so it cannot answer chats. Serve a base that generates.")
    for ref in refs:
        vlm.add(ref)
    service = Service(vlm, refs, settings)
    config = uvicorn.Config(make_app(service), log_config=None, access_log=False, server_header=False)
    server = _Server(config, service, _introduction(vlm, refs, settings, listener))
    asyncio.run(server.serve(sockets=[listener]))
    assert server.signum is not None
    return 128 + server.signum


class _Server(uvicorn.Server):
    """Says where it listens, and stops as the house does: told once it lets requests end, told again it does not."""

    def __init__(self, config: uvicorn.Config, service: Service, introduction: str):
        super().__init__(config)
        self.signum: int | None = None
        self._service, self._introduction = service, introduction

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        print(self._introduction, flush=True)

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        seconds = self._service.settings.stop_seconds
        if running := len(self.server_state.tasks):
            told = f"stopping: {running} requests may end within {seconds:g} s; once more stops at once"
            print(told, file=sys.stderr, flush=True)
        self.config.timeout_graceful_shutdown = seconds  # type: ignore[assignment]  # it may have a fraction
        await super().shutdown(sockets)
        print("stopped", file=sys.stderr)

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Notes the signals that ask to stop; one that was ignored, as under nohup, stays so."""
        before = {signum: signal.getsignal(signum) for signum in _SIGNALS}
        try:
            for signum, handler in before.items():
                if handler is not signal.SIG_IGN:
                    signal.signal(signum, self._note)
            yield
        finally:
            for signum, handler in before.items():
                signal.signal(signum, handler)

    def _note(self, signum: int, _frame: object) -> None:
        self.force_exit = self.signum is not None
        self.signum = self.signum or signum
        self._service.is_stopping = self.should_exit = True


def _introduction(vlm: VisionLanguageModel, refs: Sequence[str], settings: Settings, listener: socket.socket) -> str:
    """Returns what people are told when the server listens."""
    host, port = listener.getsockname()[:2]
    where = f"[{host}]" if ":" in host else host
    base = vlm.base
    model = f"{base.path} ({base.family.model_type}, {str(vlm.model.dtype).removeprefix('torch.')}, {vlm.model.device})"
    on_demand = f"; on demand: {', '.join(settings.allow)}" if settings.allow else ""
    keys = f"{len(settings.api_keys)} API keys" if settings.api_keys else "no API key needed"
    return (
        f"serving on http://{where}:{port}/v1\n  base: {model}\n  models: {', '.join([BASE, *refs])}{on_demand}\n"
        f"  {keys}; Ctrl-C stops"
    )
