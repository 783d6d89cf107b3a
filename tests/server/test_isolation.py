"""Whatever one client sends within the bounds, the plain question of another is answered soon."""

import json
import threading
import time

import httpx
import pytest

from tests.server.asking import many_scans
from tests.server.serving import QUESTION, body, http_client, image_part, running, wait_for

HOSTILE, HONEST = "hostile-client-key", "honest-client-key"
SECONDS = 2.0  # within which an honest question is answered
SIZE = 15_000_000  # bytes of a hostile body, of 20 MiB that are allowed


def of_messages(messages, **more):
    return json.dumps({"model": "base", "messages": messages, **more})


def parts(*content):
    return of_messages([{"role": "user", "content": list(content)}])


def message(role, text):
    return {"role": role, "content": text}


HEAVY = {
    "one text": lambda: json.dumps(body(question="a" * SIZE)),
    "a text that just fits": lambda: json.dumps(body(question="a" * 16_000, max_tokens=4)),
    "words": lambda: json.dumps(body(question="red " * (SIZE // 4))),
    "many messages": lambda: of_messages([message("user", "a" * 30_000), message("assistant", "a")] * 499),
    "more messages than allowed": lambda: of_messages([message("user", "a")] * (SIZE // 40)),
    "many parts": lambda: parts(*[{"type": "text", "text": ""}] * (SIZE // 30)),
    "many images": lambda: parts(*[image_part(many_scans(2000, 20))] * 8),
    "a long model name": lambda: json.dumps(body("a/" * (SIZE // 2))),
    "long stop texts": lambda: json.dumps(body(stop=["a" * (SIZE // 4)] * 4)),
    "long stop texts that just fit": lambda: json.dumps(body(stop=["a" * 255 + end for end in "bcde"], max_tokens=4)),
    "many stop texts": lambda: json.dumps(body(stop=["a"] * (SIZE // 6))),
    "many fields": lambda: json.dumps(body(**{f"field{number}": 1 for number in range(SIZE // 20)})),
    "much metadata": lambda: json.dumps(body(metadata={str(number): "a" for number in range(SIZE // 20)})),
    "deep lists": lambda: '{"model": "base", "messages": ' + "[" * (SIZE // 2) + "]" * (SIZE // 2) + "}",
    "no JSON": lambda: "[" + "1," * (SIZE // 2),
}


@pytest.fixture(scope="module")
def guarded(vlm):
    with running(vlm, api_keys=(HOSTILE, HONEST), request_seconds=60) as server:
        yield server


def headers(key):
    return {"Authorization": f"Bearer {key}", "Content-Type": "application/json"}


@pytest.mark.parametrize("kind", HEAVY)
def test_another_is_answered_soon(guarded, kind):
    content, ended, statuses = HEAVY[kind]().encode(), threading.Event(), []

    def attack():
        with http_client(base_url=guarded.url, timeout=120) as client:
            while not ended.is_set():
                try:
                    response = client.post("/v1/chat/completions", content=content, headers=headers(HOSTILE))
                except httpx.HTTPError:  # refused before all of it was sent
                    continue
                statuses.append(response.status_code)

    threads = [threading.Thread(target=attack) for _ in range(3)]
    for thread in threads:
        thread.start()
    try:
        wait_for(lambda: statuses, 60)
        taken = []
        for _ in range(3):
            begun = time.monotonic()
            response = guarded.post(body(question=QUESTION, max_tokens=4), headers=headers(HONEST))
            taken.append(time.monotonic() - begun)
            assert response.status_code == 200, response.text
    finally:
        ended.set()
        for thread in threads:
            thread.join(120)
    assert sorted(taken)[1] < SECONDS, taken  # the median: other tests share this machine
    assert set(statuses) <= {200, 400, 413, 429}, statuses
