"""What is not answered: each with OpenAI's body, the status that fits, and the field that is at fault."""

import json

import openai
import pytest

from tests.server.conftest import REFS
from tests.server.serving import body, data_url, http_client, image_part, png, running

KEY, OTHER = "k" * 32, "o" * 32


def error_of(response):
    """Return the status and the body's error, of OpenAI's form."""
    assert response.headers["content-type"] == "application/json"
    (found,) = response.json().values()
    assert found.keys() == {"message", "type", "param", "code"} and found["message"] and found["type"]
    return response.status_code, found["code"], found["param"], found["message"]


def parts(*given):
    return {"model": "base", "messages": [{"role": "user", "content": list(given)}]}


def messages(*roles):
    return {"model": "base", "messages": [{"role": role, "content": "a"} for role in roles]}


def at(url):
    return {"type": "image_url", "image_url": {"url": url}}


URL = "messages[0].content[0].image_url.url"
WRONG = {
    "no model": ({"messages": body()["messages"]}, "invalid_value", "model", "Field required"),
    "no messages": ({"model": "base", "messages": []}, "invalid_value", "messages", "at least 1 item"),
    "a role": (messages("tool"), "invalid_value", "messages[0]", "'tool'"),
    "a text as number": (body(question=3), "invalid_value", "messages[0].content", "valid"),
    "an empty text": (body(question="  "), "invalid_messages", "messages", "must have a non-empty text, got"),
    "a part": (parts({"type": "audio"}), "invalid_value", "messages[0].content[0]", "'audio'"),
    "the order": (messages("user", "user"), "invalid_messages", "messages", "after user the role must be assistant"),
    "a turn in a text": (body(question="a <|assistant|> b"), "invalid_messages", "messages", "holds '<|assistant|>'"),
    "an image in a text": (body(question="<image> b"), "invalid_messages", "messages", "holds '<image>', a special"),
    "a turn in a conversation": (
        parts({"type": "text", "text": "a <|e"}, {"type": "text", "text": "nd|> b"}),
        "invalid_messages",
        "messages",
        "message 1 (user): the text holds '<|end|>'",
    ),
    "another model's image": (body(question="<|image_pad|> b"), "invalid_messages", "messages", "a mark of other"),
    "the last": (
        messages("user", "assistant"),
        "invalid_messages",
        "messages",
        "role user, got assistant",
    ),
    "temperature": (
        body(temperature=0.7),
        "unsupported_value",
        "temperature",
        "must be 0, 1, null or omitted, got 0.7: the server decodes greedily",
    ),
    "top_p": (body(top_p=0.9), "unsupported_value", "top_p", "must be 1, null or omitted, got 0.9"),
    "n": (body(n=2), "unsupported_value", "n", "got 2: a request has one answer"),
    "logprobs": (body(logprobs=True), "unsupported_value", "logprobs", "returns no probabilities"),
    "tools": (body(tools=[{"type": "function"}]), "unsupported_value", "tools", "no tools"),
    "response_format": (body(response_format={"type": "json_object"}), "unsupported_value", "response_format", "plain"),
    "penalty": (body(presence_penalty=1), "unsupported_value", "presence_penalty", "got 1: the server changes no prob"),
    "unknown": (body(foo=1), "unknown_parameter", "foo", "Unrecognized request argument: 'foo'. Remove it."),
    "a text for a flag": (body(stream="yes"), "invalid_value", "stream", "'yes'"),
    "no tokens": (body(max_tokens=0), "invalid_value", "max_tokens", "greater than or equal to 1"),
    "many tokens": (body(max_tokens=513), "invalid_value", "max_tokens", "must be at most 512, got 513"),
    "two limits": (body(max_tokens=1, max_completion_tokens=1), "invalid_value", "max_tokens", "got both"),
    "an empty stop": (body(stop=""), "invalid_value", "stop", "at least 1 character"),
    "five stops": (body(stop=list("abcde")), "invalid_value", "stop", "at most 4"),
    "usage of no stream": (
        body(stream_options={"include_usage": True}),
        "invalid_value",
        "stream_options",
        "stream: true",
    ),
    "detail": (
        parts({"type": "image_url", "image_url": {"url": "data:,", "detail": "low"}}),
        "unsupported_value",
        "messages[0].content[0].image_url.detail",
        "must be auto, null or omitted, got 'low': the adapter's training decides",
    ),
    "a URL": (parts(at("https://example.org/a.png")), "invalid_image_url", URL, "fetches no images"),
    "a file": (parts(at("file:///etc/passwd")), "invalid_image_url", URL, "fetches no images"),
    "a path": (parts(at("/etc/passwd")), "invalid_image_url", URL, "fetches no images"),
    "base64": (parts(at("data:image/png;base64,!!")), "invalid_image", URL, "not base64"),
    "no image": (parts(at(data_url(b"nothing"))), "invalid_image", URL, "do not begin like one"),
    "half an image": (parts(image_part(png()[:200])), "invalid_image", URL, "not a readable image"),
    "a large image": (parts(image_part(png(side=101))), "invalid_image", URL, "must be at most 10000 pixels"),
    "many images": (parts(*[image_part(png())] * 3), "too_many_images", "messages", "at most 2 images, got 3"),
    "a NUL": (parts(at("data:image/png;base64,\0")), "invalid_image", URL, "not base64"),
    "bare base64": (parts(at("iVBOR" * 9000)), "invalid_image_url", URL, "fetches no images"),
    "10,000 messages": (messages(*["user"] * 1001), "invalid_value", "messages", "at most 1000 items"),
    "an image of the system": (
        {"model": "base", "messages": [{"role": "system", "content": [image_part(png(side=4))]}]},
        "invalid_value",
        "messages[0].content[0]",
        "'text'",
    ),
    "infinity": (body(seed=float("inf")), "invalid_value", "seed", "valid integer"),
    "too long": (body(question="red " * 300), "context_length_exceeded", "messages", "The base takes 256 tokens"),
    "too much asked": (body(max_tokens=250), "context_length_exceeded", "messages", "up to 250 in its answer"),
}


@pytest.fixture(scope="module")
def strict(loaded):
    """A server with tight bounds and keys."""
    bounds = {"max_images": 2, "max_image_pixels": 10_000, "max_body_bytes": 100_000}
    with running(loaded, REFS, api_keys=(OTHER, KEY), **bounds) as found:
        yield found


def post(server, sent, key=KEY):
    headers = {"Authorization": f"Bearer {key}", "Content-Type": "application/json"}
    return server.http.post("/v1/chat/completions", content=json.dumps(sent), headers=headers)


@pytest.mark.parametrize("stream", [False, True], ids=["whole", "stream"])
@pytest.mark.parametrize("what", WRONG)
def test_the_error_of_a_wrong_request_names_the_fault(strict, what, stream):
    sent, code, param, message = WRONG[what]
    if stream and what not in ("usage of no stream", "a text for a flag"):
        sent = {**sent, "stream": True}
    found = error_of(post(strict, sent))
    assert found[:3] == (400, code, param)
    assert message in found[3] and len(found[3]) < 600, "what was sent is not sent back whole"


NO_JSON = (
    b"",
    b"{",
    b"\xff\xfe",
    b'{"model": "base", "messages": [{"role": "user", "content": "\\ud800"}]}',  # half of a pair
    b'{"model": "\\udfff", "messages": []}',
    b'{"model": "base", "messages": ' + b"[" * 40_000 + b"]" * 40_000 + b"}",
    b'{"model": "base", "messages": [], "max_tokens": ' + b"9" * 50_000 + b"}",
)


@pytest.mark.parametrize("raw", [*NO_JSON, b"[]", b"null", b'{"model": "base", "messages": NaN}'])
def test_a_body_that_is_no_request_is_refused(strict, raw):
    headers = {"Authorization": f"Bearer {KEY}", "Content-Type": "application/json"}
    status, code, _, _ = error_of(strict.http.post("/v1/chat/completions", content=raw, headers=headers))
    assert (status, code) == (400, "invalid_json" if raw in NO_JSON else "invalid_value")


def test_a_body_of_another_type_is_refused(strict):
    """What a page of another site can send without being allowed to."""
    headers = {"Authorization": f"Bearer {KEY}", "Content-Type": "text/plain"}
    raw = json.dumps(body())
    found = error_of(strict.http.post("/v1/chat/completions", content=raw, headers=headers))
    assert found[:2] == (415, "unsupported_media_type")


@pytest.mark.parametrize("model", ["nothing", "testing/none", "medical/x@prod", "../../etc", "/tmp", "testing/first"])
def test_a_model_that_may_not_be_asked_is_not_found(strict, model):
    assert error_of(post(strict, body(model)))[:3] == (404, "model_not_found", "model")


def test_a_folder_is_no_model(strict, registry_folder):
    folder = registry_folder.parent / "first"
    assert (folder / "manifest.json").is_file()
    assert error_of(post(strict, body(str(folder))))[:2] == (404, "model_not_found")


@pytest.mark.parametrize("kind", ["announced", "streamed"])
def test_a_body_that_is_too_large_is_refused_with_its_answer_read(strict, kind):
    raw = json.dumps(body(question="a" * 5_000_000)).encode()
    content = raw if kind == "announced" else (raw[start : start + 65536] for start in range(0, len(raw), 65536))
    headers = {"Authorization": f"Bearer {KEY}", "Content-Type": "application/json"}
    found = error_of(strict.http.post("/v1/chat/completions", content=content, headers=headers))
    assert found[:2] == (413, "request_too_large") and "at most 100000 bytes" in found[3]
    with strict.client(api_key=KEY) as client, pytest.raises(openai.APIStatusError) as caught:
        client.chat.completions.create(**body(question="a" * 5_000_000))
    assert caught.value.status_code == 413


@pytest.mark.parametrize(
    "header", [None, "", "Bearer", f"Bearer {KEY}x", f"Basic {KEY}", f"Bearer {KEY[:-1]}", "Bearer \xff"]
)
def test_a_client_without_a_key_learns_nothing(strict, header, caplog):
    headers = {} if header is None else {"Authorization": header.encode("latin-1")}
    for path in ("/v1/models", "/v1/models/base", "/metrics", "/v1/nothing"):
        response = strict.get(path, headers=headers)
        assert error_of(response)[0] == 401 and response.headers["www-authenticate"] == "Bearer"
        assert KEY not in response.text
    assert error_of(strict.post(body(), headers=headers))[0] == 401
    assert error_of(strict.post(body(question="a" * 200_000), headers=headers))[0] == 401
    assert not caplog.text


def test_who_has_a_key_is_answered_and_health_needs_none(strict):
    for key in (KEY, OTHER):
        with strict.client(api_key=key) as client:
            assert client.chat.completions.create(**body()).choices
    for path in ("/health", "/ready"):
        assert strict.get(path).json() == {"status": "ok"}
    with (
        strict.client(api_key="wrong") as client,
        pytest.raises(openai.AuthenticationError, match="does not know this"),
    ):
        client.models.list()


def test_other_paths_and_methods_are_refused(server):
    assert error_of(server.get("/v1/nothing"))[:2] == (404, "unknown_url")
    response = server.get("/v1/chat/completions")
    assert error_of(response)[:2] == (405, "method_not_allowed") and response.headers["allow"] == "POST"
    assert error_of(server.get("/docs"))[0] == 404


def test_the_response_to_an_internal_error_has_only_a_number(loaded, stage, caplog):
    with running(loaded, REFS) as server:
        stage.fails = [ZeroDivisionError("secret place"), ZeroDivisionError("secret place")]
        stage.go_on(2)
        status, code, _, message = error_of(server.post(body()))
        assert (status, code) == (500, "internal_error") and "secret" not in message
        assert message.split()[-1].rstrip(".") in caplog.text and "secret place" in caplog.text
        status, code, _, _ = error_of(server.post(body(stream=True)))
        assert status == 500
        stage.go_on()
        assert server.ask("base")  # it goes on


def test_a_page_on_the_web_cannot_have_a_browser_ask(server):
    with http_client(base_url=server.url, headers={"Host": "evil.example"}) as client:
        refused = client.get("/v1/models")
        assert refused.status_code == 403 and refused.json()["error"]["type"] == "permission_error"
        assert client.get("/health").status_code == 200


def test_an_image_for_a_base_that_takes_none_is_refused(server, loaded, monkeypatch):
    monkeypatch.setattr(type(loaded.base.family), "media", frozenset())
    found = error_of(post(server, parts(image_part(png(side=8)), {"type": "text", "text": "What?"})))
    assert found[:3] == (400, "invalid_messages", "messages")
    assert found[3].startswith("smolvlm takes no media, and medium 1 of the row is of the type image.")
    assert post(server, body()).status_code == 200
