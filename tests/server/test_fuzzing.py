"""Anything that a request can hold ends in an answer, or in a 4xx of the documented form, on every family."""

import json
import logging

import pytest
from hypothesis import HealthCheck, Phase, given, settings
from starlette.testclient import TestClient

from finetune.assemble.loading import load_base
from finetune.server.http_api import make_app
from finetune.server.service import Service
from finetune.server.settings import Settings
from finetune.serving.vision_language_model import VisionLanguageModel
from tests.server.asking import MARKS, noise, requests
from tests.server.serving import body, image_part, text_part

HEADERS = {"Content-Type": "application/json", "Host": "localhost"}
MOST = 1500  # characters of a message: it never repeats a file


@pytest.fixture(scope="module")
def client(tiny_family):
    """A client in process, of a server of the plain base."""
    service = Service(VisionLanguageModel(load_base(str(tiny_family), device="cpu")), [], Settings(max_new_tokens=4))
    with TestClient(make_app(service), base_url="http://localhost", raise_server_exceptions=False) as client:
        client.tokenizer = service.vlm.processor.tokenizer
        yield client


def send(client, raw):
    """Return the status and error of a request, None where it is answered."""
    response = client.post("/v1/chat/completions", content=raw, headers=HEADERS)
    if response.status_code == 200:
        if response.headers["content-type"].startswith("application/json"):
            assert response.json()["choices"][0]["message"]["content"] is not None
            return 200, None
        *events, last = [event for event in response.text.split("\n\n") if event]
        assert last == "data: [DONE]" and events, response.text
        return 200, None
    (found,) = response.json().values()
    assert found.keys() == {"message", "type", "param", "code"} and found["type"] == "invalid_request_error", found
    assert found["message"] and len(found["message"]) < MOST, found["message"]
    assert 400 <= response.status_code < 500, found
    return response.status_code, found


def fuzz(client, number, **options):
    @settings(
        max_examples=number,
        database=None,
        deadline=None,
        phases=[Phase.generate, Phase.shrink],
        suppress_health_check=list(HealthCheck),
        **options,
    )
    @given(raw=requests(client.tokenizer.all_special_tokens))
    def check(raw):
        send(client, raw)

    check()


@pytest.fixture
def quiet():
    """Logs nothing of what thousands of requests get wrong; the tests after these do log."""
    logger = logging.getLogger("finetune")
    before = logger.level
    logger.setLevel(logging.CRITICAL)
    yield
    logger.setLevel(before)


@pytest.mark.usefixtures("quiet")
def test_thirty_requests(client):
    fuzz(client, 30, derandomize=True)


@pytest.mark.slow
@pytest.mark.usefixtures("quiet")
def test_two_thousand_requests(client):
    fuzz(client, 2000, derandomize=True)


NAMED = {
    "a strip": body(question=[image_part(noise(6000, 20)), text_part("a")]),
    "a tower": body(question=[image_part(noise(20, 6000)), text_part("a")]),
    "one pixel": body(question=[image_part(noise(1, 1)), text_part("a")]),
    "a line": body(question=[image_part(noise(300, 1)), text_part("a")]),
    "marks": body(question=" ".join(MARKS)),
    **{mark: body(question=f"What is {mark}?") for mark in ("<video>", "<|video_pad|>", "<image>", "<|image_pad|>")},
}


@pytest.mark.parametrize("what", NAMED)
def test_a_fault_of_the_client_is_never_a_server_error(client, what):
    send(client, json.dumps(NAMED[what] | {"max_tokens": 2}).encode())


def test_an_image_that_the_processor_refuses_is_a_400(client, monkeypatch):
    """As Qwen's does where one side is two hundred times the other."""
    from finetune.families.image_text_to_text import ImageTextToTextFamily

    def refuse(*args, **options):
        raise ValueError("absolute aspect ratio must be smaller than 200, got 300.0")

    monkeypatch.setattr(ImageTextToTextFamily, "encode", refuse)
    question = body(question=[image_part(noise(64, 20)), text_part("a")])
    status, found = send(client, json.dumps(question).encode())
    assert (status, found["code"], found["param"]) == (400, "invalid_messages", "messages")
    assert (
        "Processor cannot encode these texts and images. Change them: absolute aspect ratio" in found["message"]
        and "got 300.0" in found["message"]
    )
