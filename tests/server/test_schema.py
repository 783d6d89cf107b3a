"""What the server says of itself is true: schemathesis sends what the schema allows and what it does not."""

import json

import pytest
import schemathesis
from hypothesis import HealthCheck, Phase, given, settings
from schemathesis import GenerationMode
from schemathesis.checks import not_a_server_error
from schemathesis.specs.openapi.checks import (
    content_type_conformance,
    ignored_auth,
    negative_data_rejection,
    response_headers_conformance,
    response_schema_conformance,
    status_code_conformance,
    unsupported_method,
)

from finetune.server.schema import ChatRequest, ErrorBody
from tests.server.conftest import REFS
from tests.server.serving import body, running

KEY = "k" * 32
CHECKS = (
    content_type_conformance,
    ignored_auth,
    negative_data_rejection,
    not_a_server_error,
    response_headers_conformance,
    response_schema_conformance,
    status_code_conformance,
    unsupported_method,
)


@pytest.fixture(scope="module")
def guarded(resident):
    with running(resident, REFS, api_keys=(KEY,), max_new_tokens=8) as found:
        yield found


@pytest.fixture
def api(guarded):
    """What it says of itself; schemathesis keeps on it what it has learnt, so each test has its own."""
    return schemathesis.openapi.from_url(f"{guarded.url}/openapi.json")


CHAT = ("POST", "/v1/chat/completions")
READ = [
    "/v1/models",
    "/v1/models/{model}",
    "/health",
    "/ready",
    "/metrics",
]  # where nothing is sent, or any text may be


def answers(operation, mode, **fixed):
    """Returns an answer by its status, to requests that the schema allows or does not; each answer was checked."""
    found = {}

    @settings(
        max_examples=30,
        derandomize=True,
        database=None,
        deadline=None,
        phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )
    @given(case=operation.as_strategy(generation_mode=mode))
    def send(case):
        if fixed and isinstance(case.body, dict):
            case.body |= fixed
        response = case.call_and_validate(headers={"Authorization": f"Bearer {KEY}"}, checks=CHECKS)
        found[response.status_code] = f"{response.text} to {case.body!r}"

    send()
    return found


@pytest.mark.parametrize("path", READ)
def test_every_answer_of_what_is_read_is_as_the_schema_says(api, path):
    assert 200 in answers(api[path]["GET"], GenerationMode.POSITIVE) or path == "/v1/models/{model}"


ASKED = body("base", max_tokens=None, max_completion_tokens=4, stream_options=None)  # any options beside


@pytest.mark.parametrize("fixed", [{}, {"model": "base"}], ids=["any", "base"])
@pytest.mark.parametrize("mode", list(GenerationMode), ids=lambda mode: mode.value)
def test_every_answer_to_a_chat_is_as_the_schema_says(api, mode, fixed):
    found = answers(api[CHAT[1]][CHAT[0]], mode, **fixed)
    # Turns in another order, pictures that are none, too many tokens: no schema can say that.
    assert set(found) <= {200, 400, 404}, found
    assert mode is GenerationMode.POSITIVE or 400 in found


def test_every_option_that_the_schema_allows_is_taken(api):
    found = answers(api[CHAT[1]][CHAT[0]], GenerationMode.POSITIVE, **ASKED)
    assert set(found) == {200}, found.get(400)


def test_the_schema_names_every_path_status_and_key(guarded):
    found = guarded.get("/openapi.json").json()
    paths = {path: set(operations) for path, operations in found["paths"].items()}
    assert paths == {
        "/v1/chat/completions": {"post"},
        "/v1/models": {"get"},
        "/v1/models/{model}": {"get"},
        "/health": {"get"},
        "/ready": {"get"},
        "/metrics": {"get"},
    }
    chat = found["paths"]["/v1/chat/completions"]["post"]
    assert set(chat["responses"]) == {"200", "400", "401", "403", "404", "413", "415", "429", "500", "503", "504"}
    assert chat["security"] == [{"key": []}, {}]
    assert set(chat["responses"]["200"]["content"]) == {"application/json", "text/event-stream"}
    for status, response in chat["responses"].items():
        if status != "200":
            (content,) = response["content"].values()
            assert content["schema"]["$ref"].endswith(ErrorBody.__name__)
    names = {name for name in found["components"]["schemas"]}
    text = json.dumps(found)
    assert {part.partition('"')[0] for part in text.split("#/components/schemas/")[1:]} <= names


def test_what_the_schema_requires_of_a_request_is_what_is_read():
    """The body is described by hand, so it is held against what reads it."""
    described = ChatRequest.model_json_schema()
    assert described["additionalProperties"] is False and described["required"] == ["model", "messages"]
    assert ChatRequest.model_validate_json(json.dumps(body()))
