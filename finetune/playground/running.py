"""The run of the page: load the base, listen on one port, and stop cleanly."""

from __future__ import annotations

import os
import signal
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

from finetune.core.extras import require_extra
from finetune.core.quick_imports import quick_imports
from finetune.errors import LaunchError
from finetune.launch.listening import is_loopback, listening, names_loopback
from finetune.registry import AdapterRegistry

if TYPE_CHECKING:
    import socket
    from collections.abc import Sequence

    from fastapi import FastAPI
    from gradio import Blocks
    from starlette.types import ASGIApp, Message, Receive, Scope, Send

    from finetune.playground.playground import Playground

GRACE_SECONDS = 3  # for open requests to end when the page stops
MAX_UPLOAD = "25mb"
# The browser may load from this server only, also for the components of the page.
_POLICY = (
    "default-src 'self'; script-src 'self' 'unsafe-inline' 'unsafe-eval'; style-src 'self' 'unsafe-inline'; "
    "img-src 'self' data: blob:; font-src 'self' data:; connect-src 'self' data: blob:; worker-src 'self' blob:; "
    "frame-ancestors 'none'; form-action 'self'; base-uri 'self'; object-src 'none'"
)
_HEADERS = [
    (b"content-security-policy", _POLICY.encode()),
    (b"referrer-policy", b"no-referrer"),
    (b"x-content-type-options", b"nosniff"),
]


def run_app(refs: Sequence[str], *, base: str | None, registry: str | None, host: str, port: int, **held: Any) -> int:
    """Serve the page until a signal stops it.

    Args:
        refs: the references or adapter folders to offer; empty for the latest version of every adapter. The page
            always shows the plain base; ``base`` alone offers no adapter.
        base: the base's folder, hub id or embedded name; None for the folder where this machine last used that of the
            first reference.
        registry: a folder or a URL; None for the default one.
        host: the address to listen on.
        port: the port; 0 for a free one.
        **held: the device, dtype and quantization of the base, as ``finetune.load`` takes them.

    Returns:
        128 plus the number of the signal that stopped it.

    Raises:
        LaunchError: the port is taken, or no base is named.
        MissingExtraError: Gradio is not installed.
        FinetuneError: the base, a reference or the registry cannot be used.
    """
    require_extra("app", what="finetune app")
    if base is None and not set(refs) - {"base"}:
        raise LaunchError("finetune app needs a base or an adapter, got neither. Add --base (such as --base pocket).")
    from finetune.preflight import check_adapter

    for ref in dict.fromkeys(ref for ref in refs if ref != "base") or ["base"]:
        check_adapter(ref, base=base, registry=registry)
    with listening(host, port) as listener, tempfile.TemporaryDirectory(prefix="finetune-app-") as folder:
        playground = _load(refs, base, AdapterRegistry(registry), Path(folder), held)
        # Gradio reads them at import: the folder of uploads, no reports, and no check for new versions.
        os.environ |= {"GRADIO_TEMP_DIR": folder, "GRADIO_ANALYTICS_ENABLED": "False", "HF_HUB_DISABLE_TELEMETRY": "1"}
        from finetune.playground.page import build_page

        app = make_server(build_page(playground), for_all=not is_loopback(host))
        address = f"http://{f'[{host}]' if ':' in host else host}:{listener.getsockname()[1]}"
        lines = [f"{address}  (Ctrl-C stops it)"]
        if not is_loopback(host):
            lines.append("the page has no password: every machine that reaches this address can use it")
        return _serve(app, listener, "\n".join(lines))


def _load(
    refs: Sequence[str], base: str | None, registry: AdapterRegistry, folder: Path, held: dict[str, Any]
) -> Playground:
    with quick_imports():
        from finetune.families.base import embedded_path
        from finetune.playground.examples import draw_examples
        from finetune.playground.playground import Playground
        from finetune.serving.loading import load

    first = "base" if base else next(ref for ref in refs if ref != "base")
    vlm = load(first, base=base, registry=registry, **held)
    vlm.use(None)
    drawn = vlm.base.path == embedded_path("pocket")
    name = base or ("pocket" if drawn else Path(vlm.base.path).name)
    return Playground(vlm, base=name, registry=registry, refs=refs, examples=draw_examples(folder) if drawn else [])


def make_server(page: Blocks, *, for_all: bool = False) -> FastAPI:
    """Return the page as an app that reports nothing, and lets the browser load from this server only.

    Args:
        page: the page.
        for_all: True to serve requests to any host name of this machine; False for localhost only.
    """
    import gradio as gr
    from fastapi import FastAPI

    from finetune.playground.style import SCRIPT, STYLE

    fonts = ("system-ui", "sans-serif")
    # Gradio checks that a path from a browser is an upload only for pages that it has launched itself.
    page.has_launched = True
    app = FastAPI(docs_url=None, redoc_url=None, openapi_url=None)
    app.add_middleware(_HostCheck, for_all=for_all)
    return gr.mount_gradio_app(
        app,
        page,
        path="/",
        theme=gr.themes.Base(primary_hue="blue", font=fonts, font_mono=("ui-monospace", "monospace")),
        css=STYLE,
        head=SCRIPT,
        footer_links=[],
        run_history=False,
        enable_monitoring=False,
        mcp_server=False,
        ssr_mode=False,
        pwa=False,
        show_error=False,
        max_file_size=MAX_UPLOAD,
    )


class _HostCheck:
    """An ASGI middleware that adds headers to answers and, unless ``for_all``, serves requests to localhost only."""

    def __init__(self, app: ASGIApp, *, for_all: bool) -> None:
        self.app, self.for_all = app, for_all

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and not self.for_all:
            host = dict(scope["headers"]).get(b"host", b"").decode("latin-1")
            if not names_loopback(host):
                from starlette.responses import PlainTextResponse

                await PlainTextResponse("This page answers for Host localhost only. Open http://localhost.", 403)(
                    scope, receive, send
                )
                return

        async def sent(message: Message) -> None:
            if message["type"] == "http.response.start":
                message["headers"] = [*message["headers"], *_HEADERS]
            await send(message)

        await self.app(scope, receive, sent)


def _serve(app: FastAPI, listener: socket.socket, introduction: str) -> int:
    """Serve the app until a signal stops it, and print the introduction once the page can be opened."""
    import uvicorn

    class Server(uvicorn.Server):
        async def startup(self, sockets: list[socket.socket] | None = None) -> None:
            await super().startup(sockets)
            print(introduction, flush=True)

    server = Server(uvicorn.Config(app, log_level="error", access_log=False, timeout_graceful_shutdown=GRACE_SECONDS))
    stopped: list[int] = []

    def note(signum: int, frame: object) -> None:
        stopped.append(signum)
        server.should_exit = True

    # uvicorn replaces these handlers while it runs, and passes the signal to them after it has stopped.
    before = {signum: signal.signal(signum, note) for signum in (signal.SIGINT, signal.SIGTERM)}
    try:
        server.run(sockets=[listener])
    finally:
        for signum, handler in before.items():
            signal.signal(signum, handler)
    return 128 + stopped[0] if stopped else 0
