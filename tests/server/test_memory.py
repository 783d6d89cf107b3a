"""What a request holds is free as soon as it is answered: no circle of objects waits for the garbage collector."""

import gc
import json
import time
import weakref

import pytest

from finetune.server import http_api, middleware
from tests.server.serving import body, http_client, image_part, png
from tests.server.test_isolation import parts

SENT = {
    "an answer": json.dumps(body(max_tokens=2)),
    "a stream": json.dumps(body(max_tokens=2, stream=True)),
    "an image": json.dumps(body(question=[image_part(png())], max_tokens=2)),
    "no JSON": "[" * 1000,
    "a broken image": json.dumps(body(question=[image_part(png()[:60])])),
    "too many images": parts(*[image_part(png())] * 9),
    "an unknown adapter": json.dumps(body("testing/nothing")),
    "too long": json.dumps(body(question="red " * 100_000)),
}


@pytest.fixture
def born(monkeypatch):
    """Weak references to the exchanges and errors of requests, in the order in which they were made."""
    found = []
    admit, to_request_error = http_api.admit, middleware.to_request_error

    def keep(made):
        found.append(weakref.ref(made))
        return made

    monkeypatch.setattr(http_api, "admit", lambda service, client: keep(admit(service, client)))
    monkeypatch.setattr(middleware, "to_request_error", lambda error: keep(to_request_error(error)))
    gc.collect()
    gc.disable()
    yield found
    gc.enable()


@pytest.mark.parametrize("what", SENT)
def test_nothing_of_an_answered_request_stays(server, born, what):
    with http_client(base_url=server.url, timeout=60) as client:
        response = client.post(
            "/v1/chat/completions", content=SENT[what].encode(), headers={"Content-Type": "application/json"}
        )
    assert (response.status_code == 200) == (what in ("an answer", "a stream", "an image"))
    until = time.monotonic() + 10
    while (left := [one() for one in born if one() is not None]) and time.monotonic() < until:
        del left
        time.sleep(0.05)
    assert born and not left
