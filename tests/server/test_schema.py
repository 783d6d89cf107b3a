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

from finetune.server.errors import NOT_DONE
from finetune.server.request_body import parse_request
from finetune.server.schema import AsksNothing, AssistantMessage, ChatRequest, ErrorBody, ImageUrl, StreamOptions
from finetune.server.settings import Settings
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
def guarded(loaded):
    with running(loaded, REFS, api_keys=(KEY,), max_new_tokens=8) as found:
        yield found


@pytest.fixture
def api(guarded):
    """What it says of itself; schemathesis keeps on it what it has supervised, so each test has its own."""
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
    """Return an answer by its status, to requests that the schema allows or do not; each answer was checked."""
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
def test_every_response_of_a_read_matches_the_schema(api, path):
    assert 200 in answers(api[path]["GET"], GenerationMode.POSITIVE) or path == "/v1/models/{model}"


ASKED = body("base", max_tokens=None, max_completion_tokens=4, stream_options=None)  # any options beside


@pytest.mark.parametrize("fixed", [{}, {"model": "base"}], ids=["any", "base"])
@pytest.mark.parametrize("mode", list(GenerationMode), ids=lambda mode: mode.value)
def test_every_response_to_a_chat_matches_the_schema(api, mode, fixed):
    found = answers(api[CHAT[1]][CHAT[0]], mode, **fixed)
    # Turns in another order, images that are none, too many tokens: no schema can say that.
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
    refused = {"400", "401", "403", "404", "408", "413", "415", "429", "500", "503", "504"}
    assert set(chat["responses"]) == {"200", *refused}
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
    assert described["additionalProperties"] == {"type": "null"} and described["required"] == ["model", "messages"]
    assert ChatRequest.model_validate_json(json.dumps(body()))


# What clients send by themselves, and what asks for nothing.
NOTHING = [
    {"temperature": 1}, {"temperature": 1.0}, {"temperature": 0}, {"top_p": 1}, {"n": 1}, {"presence_penalty": 0},
    {"frequency_penalty": 0.0}, {"logprobs": False}, {"top_logprobs": 0}, {"logit_bias": {}}, {"tools": []},
    {"tool_choice": "none"}, {"tool_choice": "auto"}, {"parallel_tool_calls": True}, {"functions": []},
    {"response_format": {"type": "text"}}, {"modalities": ["text"]}, {"reasoning_effort": "none"}, {"store": False},
    {"verbosity": "medium"}, {"metadata": {}}, {"user": ""}, {"stop": []}, {"stream_options": {}}, {"stream": False},
    {"stream_options": {"include_usage": False, "include_obfuscation": False}}, {"service_tier": "auto"},
    {"prompt_cache_retention": "24h"}, {"top_k": None}, {"anything": None},
]  # fmt: skip


@pytest.mark.parametrize("field", [*NOTHING, *({name: None} for name in ChatRequest.model_fields if name not in ASKED)])
def test_a_field_that_asks_for_nothing_is_accepted(field):
    assert parse_request(json.dumps(body() | field).encode(), Settings())


def test_null_and_empty_fields_of_a_message_are_accepted(guarded):
    assistant = {"role": "assistant", "content": "a", "name": None, "refusal": None, "annotations": [], "audio": None}
    assistant |= {"function_call": None, "tool_calls": []}
    user = {"role": "user", "content": [{"type": "text", "text": "b", "cache_control": None}], "name": None}
    sent = {"model": "base", "messages": [user, assistant, user], "max_tokens": 1}
    headers = {"Authorization": f"Bearer {KEY}"}
    assert guarded.post(sent, headers=headers).status_code == 200


def test_every_field_that_asks_for_something_else_is_refused_by_what_to_do():
    for model in (ChatRequest, AssistantMessage, StreamOptions, ImageUrl):
        for name, field in model.model_fields.items():
            if any(isinstance(one, AsksNothing) for one in field.metadata):
                assert name in NOT_DONE, name
