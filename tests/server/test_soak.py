"""Honest and hostile clients at once for a while: the honest ones lose nothing, and the server does not grow.

``FINETUNE_SOAK_SECONDS=600 pytest -m slow -s tests/server/test_soak.py`` takes ten minutes; a minute is the default.
"""

import contextlib
import json
import os
import random
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections import Counter
from typing import NamedTuple

import httpx
import psutil
import pytest

from finetune.server.service import MAX_PREPARING
from tests.server.asking import FILES, many_scans
from tests.server.conftest import REFS
from tests.server.serving import QUESTION, body, http_client, image_part, png, text_part
from tests.server.test_isolation import HEAVY, HONEST, HOSTILE

SECONDS = float(os.environ.get("FINETUNE_SOAK_SECONDS", "60"))
SAMPLES = 20  # of the sizes, over the whole time
GROWTH = 600 * 1024 * 1024  # bytes that server and decoders may grow by in the second half of the time


class Size(NamedTuple):
    """What a server takes: bytes in memory, of itself and of its decoders, open files, and number of decoders."""

    server: int
    decoders: int
    files: int
    num_decoders: int


@pytest.fixture
def process(base_folder, registry_folder, tmp_path):
    """The server as a process, and its address."""
    keys = tmp_path / "keys"
    keys.write_text(f"{HONEST}\n{HOSTILE}\n")
    command = [sys.executable, "-m", "finetune.cli", "serve", *REFS[:2], "--base", str(base_folder), "--port", "0"]
    command += ["--registry", str(registry_folder), "--device", "cpu", "--api-key-file", str(keys)]
    command += ["--head-seconds", "3", "--body-seconds", "5", "--stop-seconds", "5"]
    log = tmp_path / "log"
    with open(log, "w") as file, subprocess.Popen(command, stdout=subprocess.PIPE, stderr=file, text=True) as child:
        lines = []
        while not (found := re.search(r"http://([\d.]+):(\d+)", "".join(lines))):
            line = child.stdout.readline()
            assert line, log.read_text()
            lines.append(line)
        yield child, found[0], (found[1], int(found[2])), log
        if child.poll() is None:
            child.kill()


def headers(key):
    return {"Authorization": f"Bearer {key}", "Content-Type": "application/json"}


def honest(url, ended, counts, wanted, number):
    """Ask one thing after another, each of which has a known answer."""
    rng = random.Random(number)
    with http_client(base_url=url, timeout=60) as client:
        while not ended.is_set():
            model, question = rng.choice(list(wanted))
            begun = time.monotonic()
            try:
                response = client.post("/v1/chat/completions", json=asked(model, question), headers=headers(HONEST))
            except httpx.HTTPError as error:
                counts["honest", type(error).__name__] += 1
                continue
            taken = time.monotonic() - begun
            counts["honest", "asked"] += 1
            if response.status_code != 200:
                counts["honest", response.status_code] += 1
            elif response.json()["choices"][0]["message"]["content"] != wanted[model, question]:
                counts["honest", "another answer"] += 1
            counts["honest", "slow"] += taken > 5
            counts["longest"] = max(counts["longest"], taken)


def asked(model, question):
    content = [image_part(png()), text_part(QUESTION)] if question == "image" else question
    return body(model, content, max_tokens=8)


def hostile(url, address, ended, counts, number):
    """Send whatever takes long, is broken, or end in the middle."""
    rng = random.Random(1000 + number)
    bodies = {name: make().encode() for name, make in HEAVY.items()}

    def post(content, key=HOSTILE, **options):
        with http_client(base_url=url, timeout=30, **options) as client:
            return client.post("/v1/chat/completions", content=content, headers=headers(key)).status_code

    def cut():
        head = "POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
        head += f"Authorization: Bearer {HOSTILE}\r\nContent-Length: 100000\r\n\r\n{{"
        with socket.create_connection(address, timeout=10) as connection:
            connection.sendall(head.encode()[: rng.randrange(1, len(head))])
            time.sleep(rng.random())
        return "cut"

    def leave():
        with contextlib.suppress(httpx.ReadTimeout), http_client(base_url=url, timeout=0.05) as client:
            client.post("/v1/chat/completions", json=body(stream=True), headers=headers(HOSTILE))
        return "left"

    kinds = [
        lambda: post(rng.choice(list(bodies.values()))),
        lambda: post(json.dumps(body(question=[image_part(rng.choice(FILES))])).encode()),
        lambda: post(json.dumps(body(question=[image_part(many_scans(1000, 90))] * 2)).encode()),
        lambda: post(b"{}", key="not-a-known-key-at-all"),
        lambda: post(rng.randbytes(1000)),
        cut,
        leave,
    ]
    while not ended.is_set():
        try:
            counts["hostile", rng.choice(kinds)()] += 1
        except (httpx.HTTPError, OSError) as error:
            counts["hostile", type(error).__name__] += 1


def size(child):
    """Return the memory of the server and of its decoders in bytes, its open files, and the number of decoders."""
    server = psutil.Process(child.pid)
    decoders = []
    for decoder in server.children(recursive=True):
        with contextlib.suppress(psutil.NoSuchProcess):  # one that took too long is killed
            decoders.append(decoder.memory_info().rss)
    return Size(server.memory_info().rss, sum(decoders), server.num_fds(), len(decoders))


@pytest.mark.slow
def test_honest_clients_lose_nothing(process, vlm):
    child, url, address, log = process
    counts, ended = Counter(), threading.Event()
    wanted = {}
    with http_client(base_url=url, timeout=60) as client:
        for model in ("base", *REFS[:2]):
            for question in (QUESTION, "Why?", "image"):
                answer = client.post("/v1/chat/completions", json=asked(model, question), headers=headers(HONEST))
                wanted[model, question] = answer.json()["choices"][0]["message"]["content"]
    threads = [threading.Thread(target=honest, args=(url, ended, counts, wanted, number)) for number in range(2)]
    threads += [threading.Thread(target=hostile, args=(url, address, ended, counts, number)) for number in range(3)]
    for thread in threads:
        thread.start()
    sizes = []
    try:
        for _ in range(SAMPLES):
            time.sleep(SECONDS / SAMPLES)
            sizes.append(size(child))
            print(f"{sizes[-1].server / 1e6:.0f} + {sizes[-1].decoders / 1e6:.0f} MB, {sizes[-1]}", flush=True)
    finally:
        ended.set()
        for thread in threads:
            thread.join(60)
    print({str(key): value for key, value in counts.items()})
    with http_client(base_url=url, timeout=60) as client:
        for (model, question), answer in wanted.items():
            response = client.post("/v1/chat/completions", json=asked(model, question), headers=headers(HONEST))
            assert response.json()["choices"][0]["message"]["content"] == answer
    assert counts["honest", "asked"] > SECONDS
    assert {what for who, what in [key for key in counts if key != "longest"] if who == "honest"} == {"asked", "slow"}
    before, after = sizes[SAMPLES // 2 - 1], sizes[-1]
    assert after.server + after.decoders - before.server - before.decoders < GROWTH
    assert after.files - before.files < 50
    assert max(one.num_decoders for one in sizes) <= MAX_PREPARING
    assert log.stat().st_size < 1_000_000
    child.send_signal(signal.SIGTERM)
    assert child.wait(30) == 128 + signal.SIGTERM
