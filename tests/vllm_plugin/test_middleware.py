"""What stands before vLLM's routes, around an app that says what reaches it."""

import asyncio
import json
from types import SimpleNamespace

import pytest
from starlette.applications import Starlette

from finetune.errors import ExportError, NotFoundError, StoreError, TrustError, YankedError
from finetune.vllm_plugin.middleware import PinnedModels

PINNED = f"testing/cell@sha256:{'a' * 64}"


class Models:
    """As vLLM's OpenAIServingModels: a base whose name reads as a reference, and what is loaded."""

    lora_requests = {"team/static": object(), PINNED: object()}

    def is_base_model(self, name):
        return name == "google/gemma-3-4b-it"


class Served:
    """Says what each reference stands for, or raises it; and remembers what it was asked."""

    def __init__(self, **meanings):
        self.meanings, self.asked = {"testing/cell@prod": PINNED, **meanings}, []

    def pinned(self, ref):
        self.asked.append(ref)
        meaning = self.meanings[ref]
        if isinstance(meaning, Exception):
            raise meaning
        return meaning


class Client:
    """Speaks ASGI to the middleware, in as many messages as it is told."""

    def __init__(self, served):
        self.served, self.reached = served, None

    async def app(self, scope, receive, send):
        message = await receive() if scope["method"] == "POST" else {"body": b""}
        headers = dict(scope["headers"])
        assert len({name.lower() for name, _ in scope["headers"]}) == len(scope["headers"])  # each once
        self.reached = SimpleNamespace(body=message["body"], headers=headers, rest=receive)
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": b""})

    def send(self, body=b"", *, path="/v1/chat/completions", method="POST", kind="application/json", parts=1, **scope):
        state = SimpleNamespace(openai_serving_models=Models())
        headers = [(b"Content-Type", kind.encode()), (b"Content-Length", str(len(body)).encode()), (b"x-y", b"z")]
        full = {"type": "http", "method": method, "path": path, "headers": headers, **scope}
        full.setdefault("app", SimpleNamespace(state=state))
        size = -(-len(body) // parts) or 1
        pieces = [body[start : start + size] for start in range(0, len(body), size)] or [b""]
        messages = [{"type": "http.request", "body": piece, "more_body": True} for piece in pieces]
        messages[-1]["more_body"] = False
        messages.append({"type": "http.disconnect"})
        sent, waiting = [], iter(messages)

        async def receive():
            return next(waiting)

        async def send(message):
            sent.append(message)

        self.reached = None
        asyncio.run(PinnedModels(self.app, served=lambda: self.served)(full, receive, send))
        return sent[0]["status"], json.loads(sent[1]["body"] or "{}")

    def chat(self, model, **more):
        return self.send(json.dumps({"messages": [], "model": model}).encode(), **more)


@pytest.fixture
def client():
    return Client(Served())


@pytest.mark.parametrize("parts", [1, 5])
def test_a_reference_becomes_its_digest(client, parts):
    image = "data:image/png;base64," + "A" * 10_000
    request = {
        "model": "testing/cell@prod",
        "messages": [{"content": image, "é\ud800": [1e-3, None]}],
        "stream": True,
    }
    client.send(json.dumps(request).encode(), parts=parts)
    assert json.loads(client.reached.body) == {**request, "model": PINNED}
    headers = client.reached.headers
    assert headers[b"content-length"] == str(len(client.reached.body)).encode() and headers[b"x-y"] == b"z"


def test_who_listens_for_the_client_to_go_hears_it(client):
    client.chat("testing/cell@prod")
    assert asyncio.run(client.reached.rest()) == {"type": "http.disconnect"}


def test_the_latest_is_asked_for_by_name_alone():
    client = Client(Served(**{"testing/cell@latest": PINNED}))
    client.chat("testing/cell")
    assert json.loads(client.reached.body)["model"] == PINNED


def test_what_vllm_has_loaded_is_looked_at_again():
    client = Client(Served(**{PINNED: TrustError("its key was revoked")}))
    assert client.chat(PINNED)[0] == 400


@pytest.mark.parametrize(
    "body",
    [
        b'{"model": "google/gemma-3-4b-it",   "x": 1}',
        b'{"model": "team/static"}',
        b'{"model": "gpt-4"}',
        b'{"model": "../../etc/passwd"}',
        b'{"model": "a/b@C D"}',
        b'{"model": 5}',
        b'{"model": null}',
        b'["model"]',
        b"{not json",
        b"\xff\xfe",
        b"[" * 100_000,
        b"",
    ],
    ids=[
        "base",
        "static",
        "word",
        "traversal",
        "no alias",
        "number",
        "null",
        "list",
        "no json",
        "bytes",
        "deep",
        "none",
    ],
)
def test_anything_else_goes_on_as_it_came(client, body):
    assert client.send(body)[0] == 200
    assert client.reached.body == body and not client.served.asked
    assert client.reached.headers[b"Content-Length"] == str(len(body)).encode()


def test_of_two_models_the_one_that_vllm_reads_is_replaced(client):
    client.send(b'{"model": "google/gemma-3-4b-it", "model": "testing/cell@prod"}')
    assert client.reached.body == json.dumps({"model": PINNED}).encode()


@pytest.mark.parametrize("kind", ["application/json; charset=utf-8", "Application/JSON"])
def test_kinds_of_json(client, kind):
    client.chat("testing/cell@prod", kind=kind)
    assert client.served.asked == ["testing/cell@prod"]


@pytest.mark.parametrize("more", [{"kind": "text/plain"}, {"method": "GET"}], ids=["text", "get"])
def test_what_is_not_read(client, more):
    client.chat("testing/cell@prod", **more)
    assert not client.served.asked and client.reached is not None


@pytest.mark.parametrize(
    "error, status, text",
    [
        (
            NotFoundError("Adapters there: secret/other"),
            404,
            "The model `{}` does not exist in the registry, or is yanked. Check its name.",
        ),
        (YankedError("because"), 404, "The model `{}` does not exist in the registry, or is yanked. Check its name."),
        (StoreError("/srv/registry"), 503, "The server cannot look up the model `{}` now. Try again later."),
        (
            TrustError("nobody signed /srv/x"),
            400,
            "The server refuses the model `{}`. The reason is in the server's log.",
        ),
        (ExportError("it has no DoRA"), 400, "The server refuses the model `{}`. The reason is in the server's log."),
    ],
)
def test_what_is_refused(error, status, text, caplog):
    client = Client(Served(**{"testing/cell@prod": error}))
    with caplog.at_level("WARNING"):
        got, body = client.chat("testing/cell@prod")
    assert (got, body["error"]["code"]) == (status, status) and client.reached is None
    assert body["error"]["message"] == text.format("testing/cell@prod")
    assert str(error) in caplog.text  # which the client is not told


@pytest.mark.parametrize(
    "path",
    [
        "/v1/load_lora_adapter",
        "/v1/load_lora_adapter/",
        "/v1/unload_lora_adapter",
        "/adapters",
        "/adapters/a/b",
        "/adapters/",
    ],
)
@pytest.mark.parametrize("method", ["POST", "DELETE", "GET"])
@pytest.mark.parametrize("root", ["", "/api"])
def test_closed_routes(client, path, method, root):
    status, body = client.send(b"{}", path=root + path, method=method, root_path=root)
    assert status == 403 and "This server loads adapters from its registry only" in body["error"]["message"]
    assert client.reached is None


def test_a_route_that_is_called_alike_is_open(client):
    assert client.send(b"{}", path="/adapters_of_mine")[0] == 200


def test_a_client_that_leaves_before_the_end_of_its_request():
    async def receive():
        return {"type": "http.disconnect"}

    async def never(*_):
        raise AssertionError

    scope = {"type": "http", "method": "POST", "path": "/x", "headers": [(b"content-type", b"application/json")]}
    asyncio.run(PinnedModels(never, served=lambda: None)(scope, receive, never))


def test_before_the_server_has_started(client):
    client.served = None
    client.chat("testing/cell@prod")
    assert json.loads(client.reached.body)["model"] == "testing/cell@prod"
    client.served = Served()
    client.chat("testing/cell@prod", app=Starlette())
    assert not client.served.asked


def test_what_is_no_request_of_http(client):
    reached = []

    async def app(*asgi):
        reached.append(asgi)

    asyncio.run(PinnedModels(app, served=lambda: client.served)({"type": "lifespan"}, None, None))
    assert reached == [({"type": "lifespan"}, None, None)]
