"""``finetune serve`` on the command line. Nothing here imports torch or FastAPI until the command runs."""

from __future__ import annotations

import argparse
import logging
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING

from finetune.adapters.reference import AdapterRef
from finetune.core.base_options import add_base_options
from finetune.core.extras import require_extra
from finetune.core.outside_text import LogFormatter
from finetune.errors import LaunchError
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
    parser.add_argument("--port", type=_port, default=8000, help="0 takes a free one (8000)")
    add_base_options(parser)
    parser.add_argument("--max-bytes", type=_count, metavar="N", help="that loaded adapters may hold together")
    parser.add_argument(
        "--api-key-file", type=Path, metavar="FILE", help=f"API keys, one a line (default: ${VARIABLE})"
    )
    parser.add_argument(
        "--allow",
        action="append",
        default=[],
        metavar="PATTERN",
        help="adapters that are loaded when they are asked for, such as 'medical/*' or '*@prod'; repeatable",
    )
    parser.add_argument("--allow-urls", action="store_true", help="fetch images from public http(s) URLs")
    for name, (kind, text) in _BOUNDS.items():
        default = next(field.default for field in fields(Settings) if field.name == name)
        parser.add_argument(
            f"--{name.replace('_', '-')}", type=kind, default=default, metavar="N", help=f"{text} ({default})"
        )
    parser.set_defaults(run=_serve)


def _serve(args: argparse.Namespace) -> int:
    refs = _canonical(args.refs)
    if not refs and args.base is None:
        raise LaunchError("finetune serve takes an adapter, or --base: give one of them. finetune serve --help")
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
            f"--host {args.host} can be reached from other machines, and anybody there could ask. Give API keys: "
            f"--api-key-file FILE, or ${VARIABLE}."
        )
    with listening(args.host, args.port) as listener:
        for ref in refs or ["base"]:
            check_adapter(ref, base=args.base, registry=args.registry)
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
        return serve(vlm, refs, settings, listener)


def _canonical(refs: Sequence[str]) -> list[str]:
    """Return references in their canonical form, without ``base``, which is always served.

    Raises:
        AdapterReferenceError: one of them is no reference, such as a folder.
    """
    return list(dict.fromkeys(str(AdapterRef.parse(ref)) for ref in refs if ref != "base"))


def _count(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{text} is less than 1")
    return value


def _seconds(text: str) -> float:
    value = float(text)
    if not 0 < value < float("inf"):
        raise argparse.ArgumentTypeError(f"{text} is no number of seconds above 0")
    return value


def _port(text: str) -> int:
    value = int(text)
    if not 0 <= value <= 65535:
        raise argparse.ArgumentTypeError(f"{text} is not between 0 and 65535")
    return value


_BOUNDS: dict[str, tuple[Callable[[str], float], str]] = {
    "max_batch": (_count, "rows that are answered at once"),
    "max_queue": (_count, "requests that may wait"),
    "max_connections": (_count, "connections that may be open"),
    "max_address_connections": (_count, "connections that one address may have open"),
    "max_new_tokens": (_count, "tokens that an answer may be asked to have"),
    "max_body_bytes": (_count, "bytes of a request"),
    "max_images": (_count, "images of a request"),
    "max_image_pixels": (_count, "width x height of an image"),
    "head_seconds": (_seconds, "seconds that a connection may take until the head of a request has come"),
    "body_seconds": (_seconds, "seconds that the body of a request may take to come"),
    "queue_seconds": (_seconds, "seconds that a request may wait to be answered"),
    "request_seconds": (_seconds, "seconds that a request may take in all"),
    "stop_seconds": (_seconds, "seconds that running requests have, when the server is stopped"),
}
