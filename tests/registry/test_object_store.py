"""What a store in a bucket does when the server does not play along; and where obstore itself has traps."""

import multiprocessing
import os
import re
from datetime import timedelta

import pytest

from finetune.errors import StoreError
from finetune.registry import AdapterRegistry, verify
from finetune.registry.storage import object_store
from finetune.registry.storage.location import open_store
from finetune.registry.storage.store import AlreadyExists, ObjectMissing, read_all
from tests.servers.fake_s3 import fake_s3

LOCATION = "s3://bucket/team/registry"
KEY = "names/medical/brain/log/000000000001.json"


@pytest.fixture
def server(monkeypatch):
    with fake_s3() as (server, environment):
        for name, value in environment.items():
            monkeypatch.setenv(name, value)
        monkeypatch.setattr(object_store, "FIRST_PAUSE", 0.001)
        short = timedelta(milliseconds=1)
        monkeypatch.setitem(object_store._RETRY, "backoff", {"init_backoff": short, "max_backoff": short, "base": 2})
        yield server


@pytest.fixture
def store(server):
    return open_store(LOCATION)


def test_objects_lie_below_the_prefix_and_nothing_else_is_seen(server, store):
    server.objects["elsewhere/x"] = b""
    server.objects["team/registry/.hidden"] = b""
    store.put(KEY, b"one")
    assert server.objects[f"team/registry/{KEY}"] == b"one"
    assert [meta.key for meta in store.list()] == [KEY]
    root = open_store("s3://bucket")
    assert sorted(meta.key for meta in root.list()) == ["elsewhere/x", f"team/registry/{KEY}"]


def test_each_call_is_one_request(server, store):
    def requests(call):
        server.log.clear()
        call()
        return [method for method, _ in server.log]

    assert requests(lambda: store.put(KEY, b"one")) == ["PUT"]
    assert requests(lambda: store.put(KEY, iter([b"one", b"two"]), mode="overwrite")) == ["PUT"]
    assert requests(lambda: store.get(KEY).read()) == ["GET"]
    assert requests(lambda: store.head(KEY)) == ["HEAD"]
    assert requests(lambda: list(store.list())) == ["GET"]
    assert requests(lambda: store.delete(KEY)) == ["POST"]


def test_a_conflict_that_came_to_nothing_is_tried_again(server, store):
    server.conflicts = 3
    store.put(KEY, b"one")
    assert server.objects[f"team/registry/{KEY}"] == b"one"
    assert [method for method, _ in server.log] == ["PUT", "HEAD"] * 3 + ["PUT"]
    server.conflicts = 1
    with pytest.raises(AlreadyExists):
        store.put(KEY, b"two")


def test_conflicts_without_end_are_an_error_and_not_someone_else(server, store):
    server.conflicts = 1000
    with pytest.raises(StoreError, match="6 times the bucket answered that another write of it is under way") as caught:
        store.put(KEY, b"one")
    assert not isinstance(caught.value, AlreadyExists)
    assert server.objects == {}


def test_a_lost_response_reports_an_existing_object(server, store):
    server.losses = 1
    with pytest.raises(AlreadyExists):  # obstore asked again, and was refused by its own object
        store.put(KEY, b"one")
    server.losses = 1
    store.put(KEY, b"two", mode="overwrite")
    assert server.objects[f"team/registry/{KEY}"] == b"two"


def test_a_connection_that_breaks_off_is_no_end_of_the_object(server, store):
    store.put(KEY, bytes(3_000_000))
    server.cuts = 1000
    with pytest.raises(StoreError, match=f"cannot read {KEY} in {LOCATION}: .*then try again"):
        read_all(store, KEY, max_bytes=4_000_000)


@pytest.mark.parametrize("fault", ["conflicts", "losses"])
def test_a_registry_bears_conflicts_and_lost_answers_at_every_write(server, make_adapter, fault):
    first, second = make_adapter(seed=1), make_adapter(seed=2)
    for number in (1, 3):
        registry = AdapterRegistry(f"s3://bucket/{fault}-{number}")
        for folder in (first, second):
            setattr(server, fault, number)
            assert registry.publish(folder, aliases=["prod"]).aliases == ("latest", "prod")
        setattr(server, fault, number)
        registry.alias("medical/brain-mri", "prod", 1)
        setattr(server, fault, 0)
        assert [(c.op, c.version) for c in registry.log("medical/brain-mri")] == [
            ("publish", 1),
            ("publish", 2),
            ("alias", 2),
        ]
        assert verify(registry).problems == []


@pytest.mark.parametrize(
    ("refusal", "message"),
    [
        ((403, "AccessDenied"), "403 Forbidden: AccessDenied: As the test wants it. Check AWS_ACCESS_KEY_ID and"),
        ((404, "NoSuchBucket"), "404 Not Found: NoSuchBucket: As the test wants it. Create the bucket 'bucket', or"),
        ((400, "Bad"), "400 Bad Request: Bad: As the test wants it. Check the network and the endpoint"),
    ],
)
def test_a_refusal_names_a_way_out(server, store, refusal, message):
    server.refusal = refusal
    calls = {
        "write": lambda: store.put(KEY, b""),
        "read": lambda: store.get(KEY),
        "list": lambda: list(store.list("names")),
    }
    for verb, call in calls.items():
        with pytest.raises(StoreError, match=f"cannot {verb} names.* in {LOCATION}: {message}") as caught:
            call()
        assert not isinstance(caught.value, ObjectMissing | AlreadyExists)


@pytest.mark.parametrize("mode", ["create", "overwrite"])
def test_a_409_that_is_no_one_else_is_a_refusal(server, store, mode):
    server.refusal = (409, "OperationAborted")
    with pytest.raises(StoreError, match="409 Conflict") as caught:
        store.put(KEY, b"", mode=mode)
    assert not isinstance(caught.value, AlreadyExists)


def test_a_missing_bucket_is_no_empty_registry(server):
    with pytest.raises(StoreError, match="cannot read registry.json in s3://other: .*Create the bucket 'other', or"):
        AdapterRegistry("s3://other").resolve("medical/brain-mri")


def test_a_server_that_is_not_there(server, monkeypatch):
    monkeypatch.setenv("AWS_ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setitem(object_store._RETRY, "max_retries", 1)
    with pytest.raises(
        StoreError, match="Check the network and the endpoint .AWS_ENDPOINT, .*AWS_ALLOW_HTTP=true for http://., then"
    ):
        open_store(LOCATION).head(KEY)


def test_credentials_that_are_missing(monkeypatch):
    monkeypatch.delenv("AZURE_STORAGE_ACCOUNT_NAME", raising=False)
    with pytest.raises(
        StoreError, match="Account must be specified. Give your credentials: set AZURE_STORAGE_ACCOUNT_NAME"
    ):
        open_store("az://box")


def test_a_signature_in_a_url_is_not_shown():
    error = StoreError("Generic error: GET http://x/y?sv=1&sig=SECRET failed\n\nDebug source:\nmore sig=SECRET")
    assert object_store._in_short(error) == "Generic error: GET http://x/y?... failed"


def test_the_environment_cannot_switch_conditions_off(server, monkeypatch):
    monkeypatch.setenv("AWS_CONDITIONAL_PUT", "disabled")
    store = open_store(LOCATION)
    store.put(KEY, b"one")
    with pytest.raises(AlreadyExists):
        store.put(KEY, b"two")


def _ask_in_child(connection, store) -> None:
    try:
        store.head(KEY)
        connection.send("answered")
    except Exception as error:
        connection.send(f"{type(error).__name__}: {error}")


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")
@pytest.mark.filterwarnings("ignore:.*multi-threaded, use of fork:DeprecationWarning")
def test_a_forked_process_gets_an_error_and_does_not_hang(store):
    store.put(KEY, b"one")
    ours, theirs = multiprocessing.Pipe()
    child = multiprocessing.get_context("fork").Process(target=_ask_in_child, args=(theirs, store))
    child.start()
    try:
        assert ours.poll(30), "the child hangs"
        message = ours.recv()
        child.join(30)
        assert child.exitcode == 0
    finally:
        child.kill()
        child.join()
    assert re.match("StoreError: this process was forked from one that has used an object store.*'spawn'", message)
    assert store.head(KEY).size == 3
