"""The worker process that decodes images from outside: its memory is bounded, and it can be killed after a time.

It imports only numpy and PIL. Requests come on standard input, answers go to standard output. Each is a line of JSON,
and then as many bytes as that line has under ``num_bytes``.
"""

from __future__ import annotations

import json
import os
import sys
import time
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

import numpy as np
from PIL import AvifImagePlugin

from finetune.data.images import no_bomb_warnings, read_pixels, read_through
from finetune.errors import RowError

if TYPE_CHECKING:
    from collections.abc import Callable

BYTES_PER_PIXEL = 32  # of memory while an image is decoded: its pixels in several modes, one beside the other
SPARE_BYTES = 512 * 1024 * 1024  # of memory for everything else, such as the file and the tables of its decoder


def send(stream: IO[bytes], header: dict[str, Any], payload: bytes = b"") -> None:
    """Write one message.

    Args:
        stream: the stream to write to.
        header: the values of the message, as JSON.
        payload: the bytes that follow the header.
    """
    stream.write(json.dumps({**header, "num_bytes": len(payload)}).encode() + b"\n")
    stream.write(payload)
    stream.flush()


def receive(stream: IO[bytes]) -> tuple[dict[str, Any], bytes] | None:
    """Return the next message, or None if the other process has ended."""
    line = stream.readline()
    if not line.endswith(b"\n"):
        return None
    header = json.loads(line)
    payload = stream.read(header["num_bytes"])
    return (header, payload) if len(payload) == header["num_bytes"] else None


def main() -> None:
    """Answer requests until standard input ends."""
    requests, answers = sys.stdin.buffer, os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # a decoder that prints must not write into the answers
    AvifImagePlugin.DEFAULT_MAX_THREADS = 1  # each thread allocates memory
    limit = _limits()
    send(answers, {"ready": True})
    with no_bomb_warnings():
        while message := receive(requests):
            header, payload = message
            limit(SPARE_BYTES + BYTES_PER_PIXEL * header["max_pixels"], header["seconds"])
            send(answers, *_answer(header, payload))


def _answer(header: dict[str, Any], payload: bytes) -> tuple[dict[str, Any], bytes]:
    source = Path(header["path"]) if header["path"] is not None else payload
    options = {"max_pixels": header["max_pixels"], "name": header["name"], "page": header["page"]}
    try:
        if not header["wants_pixels"]:
            facts = read_through(source, **options)
            return {"facts": {"size": facts.size, "values": facts.values, "colors": facts.colors}}, b""
        pixels = np.ascontiguousarray(read_pixels(source, **options))
        return {"shape": pixels.shape, "dtype": str(pixels.dtype)}, pixels.tobytes()
    except RowError as error:
        return {"error": str(error), "reason": error.reason}, b""
    except MemoryError:
        fault = "the image needs too much memory to decode. Save it as PNG, or make it smaller."
        return {"error": f"{header['name']}: {fault}", "reason": "too much memory"}, b""


def _limits() -> Callable[[int, int], None]:
    """Return a function that limits this process: bytes of memory above its present use, and seconds of CPU time."""
    try:
        import resource

        used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    except (ImportError, OSError):  # on Windows and macOS, only the parent bounds the time
        return lambda num_bytes, seconds: None

    def set_limit(what: int, wanted: int) -> None:
        _, hard = resource.getrlimit(what)
        resource.setrlimit(what, (wanted if hard == resource.RLIM_INFINITY else min(wanted, hard), hard))

    def limit(num_bytes: int, seconds: int) -> None:
        set_limit(resource.RLIMIT_AS, used + num_bytes)
        set_limit(resource.RLIMIT_CPU, int(time.process_time()) + seconds + 1)

    return limit
