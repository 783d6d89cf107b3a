"""``finetune serve`` on the command line. Nothing here imports torch or FastAPI until the command runs."""

from __future__ import annotations

import argparse
import logging
import time
from contextlib import suppress
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING

from finetune.adapters.reference import AdapterRef
from finetune.core.base_options import add_base_options
from finetune.core.extras import require_extra
from finetune.core.outside_text import LogFormatter
from finetune.core.quick_imports import quick_imports
from finetune.errors import LaunchError, brief
from finetune.launch.listening import is_loopback, listening
from finetune.preflight import check_adapter
from finetune.server.keys import VARIABLE, read_keys
from finetune.server.settings import Settings

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

_EPILOG = """\
examples:
  finetune serve medical/brain-mri@prod retail/clothing@prod
  finetune serve --base pocket --allow 'medical/*' --max-bytes 2000000000
"""


def add_parser(add: Callable[[str, str], argparse.ArgumentParser]) -> None:
    """Add the verb.

    Args:
        add: the function that adds a parser, given the verb and its help.
    """
    parser = add("serve", "answer OpenAI's chat completions over HTTP, by adapters that are chosen by name")
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.epilog = _EPILOG
    parser.add_argument(
        "refs",
        nargs="*",
        metavar="REF",
        help="adapter to load and serve, such as medical/brain-mri@prod; `base` is always served",
    )
    parser.add_argument(
        "--base", metavar="BASE", help="folder, hub id or embedded name (default: that of the first REF)"
    )
    parser.add_argument("--registry", metavar="WHERE", help="folder or URL (default: $FINETUNE_REGISTRY)")
    parser.add_argument("--host", default="127.0.0.1", help="address to listen on (127.0.0.1)")
    parser.add_argument("--port", type=_port, default=8000, help="port to listen on; 0 takes a free port (8000)")
    add_base_options(parser)
    parser.add_argument("--max-bytes", type=_count, metavar="N", help="limit, in bytes, for all loaded adapters")
    parser.add_argument(
        "--api-key-file", type=Path, metavar="FILE", help=f"file of API keys, one per line (default: ${VARIABLE})"
    )
    parser.add_argument(
        "--allow",
        action="append",
        default=[],
        metavar="PATTERN",
        help="pattern of adapters to load on the first request, such as 'medical/*' or '*@prod'; repeatable",
    )
    parser.add_argument("--allow-urls", action="store_true", help="fetch images from public http(s) URLs")
    for name, (kind, text) in _BOUNDS.items():
        default = next(field.default for field in fields(Settings) if field.name == name)
        parser.add_argument(
            f"--{name.replace('_', '-')}", type=kind, default=default, metavar="N", help=f"{text} ({default})"
        )
    parser.set_defaults(run=_serve)


def _serve(args: argparse.Namespace) -> int:
    begun = time.monotonic() - time.process_time()  # the interpreter and the imports so far took CPU time alone
    refs = _canonical(args.refs)
    if not refs and args.base is None:
        raise LaunchError("finetune serve needs an adapter or --base, got neither. Add one; see finetune serve --help.")
    settings = Settings(
        allow=tuple(args.allow),
        allow_urls=args.allow_urls,
        api_keys=read_keys(args.api_key_file),
        **{name: getattr(args, name) for name in _BOUNDS},
    )
    require_extra("serve", what="finetune serve")
    handler = logging.StreamHandler()
    handler.setFormatter(LogFormatter())
    logging.basicConfig(handlers=[handler])
    if not settings.api_keys and not is_loopback(args.host):
        raise LaunchError(
            f"A server that other machines can reach needs API keys, and none is set (--host {args.host}). Set them "
            f"with --api-key-file FILE or ${VARIABLE}."
        )
    with listening(args.host, args.port) as listener:
        for ref in refs or ["base"]:
            check_adapter(ref, base=args.base, registry=args.registry)
        with quick_imports():
            from finetune.server.run import serve
            from finetune.serving.loading import load

        vlm = load(
            refs[0] if args.base is None else "base",
            base=args.base,
            registry=args.registry,
            device=args.device,
            dtype=args.dtype,
            quantization=args.quantization,
            max_bytes=args.max_bytes,
        )
        vlm.use(None)
        return serve(vlm, refs, settings, listener, begun=begun)


def _canonical(refs: Sequence[str]) -> list[str]:
    """Return references in their canonical form, without ``base``, which is always served.

    Raises:
        AdapterReferenceError: one of ``refs`` is not a registry reference, for example a folder.
    """
    return list(dict.fromkeys(str(AdapterRef.parse(ref)) for ref in refs if ref != "base"))


def _count(text: str) -> int:
    with suppress(ValueError):
        if (value := int(text)) >= 1:
            return value
    raise argparse.ArgumentTypeError(f"must be an integer of at least 1, got {brief(text)}")


def _seconds(text: str) -> float:
    with suppress(ValueError):
        if 0 < (value := float(text)) < float("inf"):
            return value
    raise argparse.ArgumentTypeError(f"must be a number of seconds above 0, got {brief(text)}")


def _port(text: str) -> int:
    with suppress(ValueError):
        if 0 <= (value := int(text)) <= 65535:
            return value
    raise argparse.ArgumentTypeError(f"must be an integer from 0 to 65535, got {brief(text)}")


_BOUNDS: dict[str, tuple[Callable[[str], float], str]] = {
    "max_batch": (_count, "maximum number of requests in a batch"),
    "max_queue": (_count, "maximum number of requests that wait"),
    "max_connections": (_count, "maximum number of open connections"),
    "max_address_connections": (_count, "maximum number of open connections of one address"),
    "max_new_tokens": (_count, "largest max_completion_tokens of a request"),
    "max_body_bytes": (_count, "maximum size of a request body, in bytes"),
    "max_images": (_count, "maximum number of images in a request"),
    "max_image_pixels": (_count, "maximum width x height of an image"),
    "head_seconds": (_seconds, "seconds that a connection may take to send the head of a request"),
    "body_seconds": (_seconds, "seconds that a connection may take to send the body of a request"),
    "queue_seconds": (_seconds, "seconds that a request may wait for its batch"),
    "request_seconds": (_seconds, "seconds that a request may take in all"),
    "stop_seconds": (_seconds, "seconds that running requests have to end when the server stops"),
}
