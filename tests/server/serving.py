"""A real server on loopback in a thread of the test, with adapters whose answers are known."""

import base64
import contextlib
import io
import signal
import socket
import threading
import time
from dataclasses import dataclass
from typing import Any

import httpx
import numpy as np
import openai
from PIL import Image

from finetune.server.run import Server
from finetune.server.service import Service
from finetune.server.settings import Settings

QUESTION = "What color is it?"


@dataclass(frozen=True)
class Running:
    """A server that answers."""

    url: str
    service: Service
    http: httpx.Client
    server: Server

    def client(self, **options: Any) -> openai.OpenAI:
        options = {"api_key": "none", "max_retries": 0, "http_client": http_client(), **options}
        return openai.OpenAI(base_url=f"{self.url}/v1", **options)

    def get(self, path: str, **options: Any) -> httpx.Response:
        return self.http.get(path, **options)

    def post(self, body: Any, **options: Any) -> httpx.Response:
        return self.http.post("/v1/chat/completions", json=body, **options)

    def ask(self, model: str, question: str = QUESTION, **more: Any) -> str:
        messages = [{"role": "user", "content": question}]
        with self.client() as client:
            return client.chat.completions.create(model=model, messages=messages, **more).choices[0].message.content


@contextlib.contextmanager
def running(vlm, refs=(), **settings):
    """Yield a server that has only just begun, and stop it."""
    service = Service(vlm, refs, Settings(**settings))
    server = Server(service, "serving a test", begun=time.monotonic())
    with socket.create_server(("127.0.0.1", 0)) as listener:
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
        thread.start()
        try:
            wait_for(lambda: server.started)
            url = f"http://127.0.0.1:{listener.getsockname()[1]}"
            with http_client(base_url=url, timeout=60) as client:
                yield Running(url, service, client, server)
        finally:
            if server.signum is None:
                server.stop(signal.SIGTERM)
            thread.join(30)
            assert not thread.is_alive()


def http_client(**options: Any) -> httpx.Client:
    """A client that reads no certificates, which takes longer than a test."""
    return httpx.Client(verify=False, trust_env=False, **options)


def wait_for(condition, seconds: float = 20.0) -> None:
    """Wait until something holds."""
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it did not come true"
        time.sleep(0.005)


def body(model: str = "base", question: Any = QUESTION, **more: Any) -> dict[str, Any]:
    """A request of one message."""
    return {"model": model, "messages": [{"role": "user", "content": question}], **more}


def png(color: str = "red", side: int = 32) -> bytes:
    """The file of an image that is not of one colour alone."""
    pixels = np.random.default_rng(0).integers(0, 60, (side, side, 3), dtype=np.uint8)
    pixels[..., "red green blue".split().index(color)] += 180
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG")
    return file.getvalue()


def data_url(data: bytes) -> str:
    return "data:image/png;base64," + base64.b64encode(data).decode()


def image_part(data: bytes) -> dict[str, Any]:
    return {"type": "image_url", "image_url": {"url": data_url(data)}}


def text_part(text: str) -> dict[str, Any]:
    return {"type": "text", "text": text}


class Stage:
    """Has batches wait: each is noted when it comes, and goes on when it is let.

    Stands in the place of ``answer_batch`` in the scheduler.
    """

    def __init__(self, answer_batch):
        self.batches: list[list[str | None]] = []  # the adapter of each row
        self.stopped: list[int] = []  # rows that were stopped while they waited
        self.fails: list[Exception] = []  # what the next batches fail with
        self._answer_batch = answer_batch
        self._going = threading.Semaphore(0)

    def go_on(self, batches: int = 1) -> None:
        """Let so many batches be answered."""
        self._going.release(batches)

    def __call__(self, switcher, batch, loaded_adapters, *, is_stopped, **more):
        self.batches.append([loaded and loaded.ref for loaded in loaded_adapters])
        while not self._going.acquire(timeout=0.005):
            rows = [row for row in range(len(loaded_adapters)) if is_stopped(row)]
            self.stopped = rows
            if len(rows) == len(loaded_adapters):
                break
        if self.fails:
            raise self.fails.pop(0)
        return self._answer_batch(switcher, batch, loaded_adapters, is_stopped=is_stopped, **more)
