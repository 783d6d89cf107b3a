"""`finetune serve` under a mixed load: right answers only, and how many more than one request at a time.

python -m benchmarks.serving --json serving.json      takes about 10 minutes on two idle CPU cores
"""

from __future__ import annotations

import argparse
import asyncio
import base64
import contextlib
import io
import json
import os
import random
import subprocess
import sys
import tempfile
import time
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import httpx
import openai
import torch
from PIL import Image

from benchmarks.adapters import make_adapter
from benchmarks.measure import BenchmarkError
from benchmarks.models import SETUPS
from benchmarks.results import machine
from finetune.adapters.manifest import MANIFEST_NAME, AdapterManifest
from finetune.assemble.loading import load_base
from finetune.registry import AdapterRegistry
from finetune.serving.vision_language_model import VisionLanguageModel

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

RANKS = (4, 8, 16, 32) * 2  # of the adapters
QUESTIONS = ("What is it?", "Which color is it?", "Where is it? " * 4, "How many are there? " * 10)
BODY_BYTES = 60_000  # that a request may have
# What one of a hundred requests is: a question for an adapter, with or without an image; or one to be refused.
SHARES = {"text": 62, "image": 30, "large": 3, "bad": 3, "unknown": 2}
REFUSED = {"large": 413, "bad": 400, "unknown": 404}


@dataclass(frozen=True)
class Asked:
    """One request: its question, and the expected answer."""

    kind: str
    model: str
    content: Any
    stream: bool
    answer: str | None  # None where it is refused


def main(arguments: list[str] | None = None) -> int:
    """Measure, print a table and write the figures."""
    options = _parse(arguments)
    with tempfile.TemporaryDirectory(prefix="benchmark-") as name:
        folder = Path(name)
        # Nothing is left, and nothing found, elsewhere.
        os.environ["FINETUNE_CACHE"], os.environ["FINETUNE_REGISTRY"] = str(folder / "cache"), str(folder / "registry")
        path = str(SETUPS[options.model].save(folder / "base", torch.float32))
        refs = publish(path, folder, new_tokens=options.new_tokens)
        requests = plan(path, refs, options.requests, side=options.side)
        one_by_one = requests[: options.one_by_one or len(requests)]
        with serving(path, refs, max_batch=options.max_batch) as url:
            batched = asyncio.run(ask_all(url, requests, at_once=options.at_once))
            batches = _batch_rows(url)
            sequential = asyncio.run(ask_all(url, one_by_one, at_once=1))
    figures = {
        "requests_per_second": len(requests) / batched["seconds"],
        "one_by_one_per_second": len(one_by_one) / sequential["seconds"],
        "wrong": batched["wrong"] + sequential["wrong"],
        "failed": batched["failed"] + sequential["failed"],
        "refused_429": batched["refused_429"],
        "mean_batch_rows": batches,
    }
    figures["batched_vs_one_by_one"] = figures["requests_per_second"] / figures["one_by_one_per_second"]
    print(table(figures, batched))
    if options.json:
        details = {
            "machine": machine(torch.device("cpu")),
            "model": SETUPS[options.model].title,
            "requests": len(requests),
            "one_by_one": len(one_by_one),
            "at_once": options.at_once,
            "max_batch": options.max_batch,
            "new_tokens": options.new_tokens,
            "adapters": len(refs),
            "statuses": batched["statuses"],
        }
        options.json.write_text(json.dumps(figures | {"details": details}, indent=1) + "\n", encoding="utf-8")
    return int(figures["wrong"] + figures["failed"] > 0)


def publish(path: str, folder: Path, *, new_tokens: int) -> list[str]:
    """Publish adapters of several ranks, each with other answers; return their references."""
    base, registry, refs = load_base(path, device="cpu"), AdapterRegistry(), []
    for number, rank in enumerate(RANKS):
        made = make_adapter(base, folder / f"adapter-{number}", r=rank, seed=number, max_new_tokens=new_tokens, std=0.3)
        manifest = AdapterManifest.parse((made / MANIFEST_NAME).read_bytes(), source=MANIFEST_NAME)
        named = AdapterManifest.model_validate(manifest.model_dump() | {"name": f"adapter-{number}"})
        (made / MANIFEST_NAME).write_bytes(named.to_bytes())
        refs.append(registry.publish(made, aliases=["prod"]).full_name + "@prod")
    return refs


def plan(path: str, refs: Sequence[str], count: int, *, side: int) -> list[Asked]:
    """Return requests in a random order that is the same each time, with what each must be answered.

    Answers are those that each adapter gives when it is asked alone, in this process.

    Args:
        path: the folder of the base.
        refs: the references of the adapters.
        count: the number of requests.
        side: the side of an image, in pixels.

    Raises:
        BenchmarkError: two adapters give the same answers, so the benchmark could not distinguish them.
    """
    vlm = VisionLanguageModel(load_base(path, device="cpu"), registry=AdapterRegistry())
    images = [_png(color, side) for color in ("red", "teal")]
    answers: dict[tuple[str, str, bytes | None], str] = {}
    for ref in refs:
        with vlm.using(ref):
            for question in QUESTIONS:
                for image in (None, *images):
                    answers[ref, question, image] = vlm.ask(image, question)
    for question in QUESTIONS:
        for image in (None, *images):
            distinct = {answers[ref, question, image] for ref in refs}
            if len(distinct) < len(refs):
                raise BenchmarkError(
                    f"all adapters must give different answers to {question!r}, got {sorted(distinct)}"
                )
    draw = random.Random(0)
    kinds = draw.choices(list(SHARES), list(SHARES.values()), k=count)
    return [_request(kind, draw.choice(refs), draw, images, answers) for kind in kinds]


def _request(
    kind: str,
    ref: str,
    draw: random.Random,
    images: Sequence[bytes],
    answers: dict[tuple[str, str, bytes | None], str],
) -> Asked:
    question, stream = draw.choice(QUESTIONS), draw.random() < 0.5
    image = draw.choice(images) if kind == "image" else None
    match kind:
        case "large":
            return Asked(kind, ref, "a" * BODY_BYTES, stream, None)
        case "bad":
            return Asked(kind, ref, [_image(b"no image")], stream, None)
        case "unknown":
            return Asked(kind, f"{ref.partition('@')[0]}-{draw.randrange(50)}@prod", question, stream, None)
    content: Any = question if image is None else [{"type": "text", "text": question}, _image(image)]
    return Asked(kind, ref, content, stream, answers[ref, question, image])


async def ask_all(url: str, requests: Sequence[Asked], *, at_once: int) -> dict[str, Any]:
    """Send requests, so many at once, each again while the server is full.

    Args:
        url: the address of the server.
        requests: the requests, in their order.
        at_once: the number of requests at the same time.

    Returns:
        ``seconds``, how many answers were ``wrong``, how many requests ``failed`` that should not, or were answered
        that should not, ``refused_429`` how often one had to be sent again, and ``statuses`` of all.
    """
    statuses: Counter[str] = Counter()
    found = {"wrong": 0, "failed": 0, "refused_429": 0}
    waiting = iter(requests)

    async def work(client: openai.AsyncOpenAI) -> None:
        for asked in waiting:
            while True:
                status, answer = await _ask(client, asked)
                statuses[f"{asked.kind} {status}"] += 1
                if status != 429:
                    break
                found["refused_429"] += 1
                await asyncio.sleep(0.05)
            found["failed"] += status != REFUSED.get(asked.kind, 200)
            found["wrong"] += status == 200 and answer != asked.answer

    begun = time.perf_counter()
    limits = httpx.Limits(max_connections=at_once, max_keepalive_connections=at_once)
    async with (
        httpx.AsyncClient(limits=limits, timeout=600, trust_env=False) as http,
        openai.AsyncOpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0, http_client=http) as client,
    ):
        await asyncio.gather(*(work(client) for _ in range(at_once)))
    return {"seconds": time.perf_counter() - begun, **found, "statuses": dict(sorted(statuses.items()))}


async def _ask(client: openai.AsyncOpenAI, asked: Asked) -> tuple[int, str]:
    messages: Any = [{"role": "user", "content": asked.content}]
    try:
        if not asked.stream:
            done = await client.chat.completions.create(model=asked.model, messages=messages)
            return 200, done.choices[0].message.content or ""
        text = ""
        async for chunk in await client.chat.completions.create(model=asked.model, messages=messages, stream=True):
            text += chunk.choices[0].delta.content or ""
        return 200, text
    except openai.APIStatusError as error:
        return error.status_code, ""
    except openai.APIConnectionError:
        return 0, ""


@contextlib.contextmanager
def serving(path: str, refs: Sequence[str], *, max_batch: int) -> Iterator[str]:
    """Start the command as a user does, and yield its address.

    Raises:
        BenchmarkError: the server does not start.
    """
    command = [sys.executable, "-m", "finetune.cli", "serve", *refs, "--base", path, "--port", "0", "--device", "cpu"]
    command += ["--max-body-bytes", str(BODY_BYTES), "--max-batch", str(max_batch), "--allow", "bench/*"]
    server = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert server.stdout is not None
    try:
        line = server.stdout.readline()
        if not line.startswith("serving on "):
            raise BenchmarkError(f"the server must print its address when it starts, got {line!r}")
        yield line.removeprefix("serving on ").strip().removesuffix("/v1")
    finally:
        server.terminate()
        server.wait(60)
        server.stdout.close()


def table(figures: dict[str, Any], batched: dict[str, Any]) -> str:
    """Return the table for people."""
    return "\n".join(
        [
            f"{figures['requests_per_second']:.1f} requests/s, one by one {figures['one_by_one_per_second']:.1f}: "
            f"{figures['batched_vs_one_by_one']:.2f} times as many; {figures['mean_batch_rows']:.1f} rows a batch",
            f"answered by the wrong adapter: {figures['wrong']}; failed: {figures['failed']}; "
            f"sent again because the server was full: {figures['refused_429']}",
            *(f"  {status}: {count}" for status, count in batched["statuses"].items()),
        ]
    )


def _batch_rows(url: str) -> float:
    """Return the mean number of rows of the server's batches."""
    counts = {}
    for line in httpx.get(f"{url}/metrics", trust_env=False).text.splitlines():
        name, _, value = line.rpartition(" ")
        counts[name] = value
    return float(counts["finetune_batch_rows_sum"]) / float(counts["finetune_batch_rows_count"])


def _png(color: str, side: int) -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (side, side), color).save(file, "PNG")
    return file.getvalue()


def _image(data: bytes) -> dict[str, Any]:
    return {"type": "image_url", "image_url": {"url": f"data:image/png;base64,{base64.b64encode(data).decode()}"}}


def _parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.serving", description=__doc__)
    parser.add_argument("--model", choices=sorted(SETUPS), default="a", help="base: a, the pocket model (default)")
    parser.add_argument("--requests", type=int, default=5000)
    parser.add_argument("--one-by-one", type=int, metavar="N", help="requests that are sent one by one (default: all)")
    parser.add_argument("--at-once", type=int, default=96, help="requests at the same time (96)")
    parser.add_argument("--max-batch", type=int, default=16)
    parser.add_argument("--new-tokens", type=int, default=16, help="largest number of tokens of an answer")
    parser.add_argument("--side", type=int, default=64, help="side of an image, in pixels")
    parser.add_argument("--json", type=Path, metavar="FILE")
    return parser.parse_args(arguments)


if __name__ == "__main__":
    sys.exit(main())
