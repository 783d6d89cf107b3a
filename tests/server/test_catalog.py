"""Adapters come when they are asked for, where that is allowed; the registry is asked little, whatever names come."""

import os
import shutil
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest

from finetune.errors import StoreError
from finetune.registry import AdapterRegistry
from finetune.serving.vision_language_model import VisionLanguageModel
from tests.server.conftest import REFS
from tests.server.serving import body, running, wait_for
from tests.server.test_refusals import error_of

FIRST, SECOND, DORA, PROMPTED = REFS


class CountedRegistry(AdapterRegistry):
    """Counts what it is asked, and fails or waits where the test says so."""

    def __init__(self, location):
        super().__init__(location)
        self.asked, self.listed = [], 0
        self.waits = threading.Event()
        self.waits.set()
        self.fails = None

    def resolve(self, ref):
        self.asked.append(str(ref))
        self.waits.wait(30)
        if self.fails:
            raise self.fails
        return super().resolve(ref)

    def list(self, *args, **options):
        self.listed += 1
        if self.fails:
            raise self.fails
        return super().list(*args, **options)


@pytest.fixture
def fresh(vlm, registry_folder):
    """A model with nothing loaded, on a counted registry."""
    registry = CountedRegistry(registry_folder)
    return VisionLanguageModel(vlm.base, registry=registry), registry


def ids(server):
    return [model["id"] for model in server.get("/v1/models").json()["data"]]


def test_an_adapter_comes_when_it_is_asked_for_and_is_listed_before(fresh):
    model, registry = fresh
    with running(model, allow=["testing/*"]) as server:
        prod = [ref for ref in sorted(REFS)]
        latest = [ref.replace("@prod", "@latest") for ref in prod]
        assert ids(server) == sorted(["base", *prod, *latest])
        answers = {server.ask(ref) for ref in (FIRST, "testing/first", "testing/first@1", f"testing/first@{'prod'}")}
        assert len(answers) == 1
        assert len(model.switcher.loaded_adapters) == 1
        assert registry.asked == [FIRST, "testing/first@latest", "testing/first@1"]
        assert ids(server) == sorted(["base", *prod, *latest]) and registry.listed == 1


@pytest.mark.parametrize(
    "allow, may, may_not",
    [
        (["testing/first"], ["testing/first", FIRST, "testing/first@1"], [SECOND]),
        (["*@prod"], [FIRST, SECOND], ["testing/first", "testing/first@1"]),
        (["testing/f*@prod", SECOND], [FIRST, SECOND], ["testing/second", DORA]),
        ([], ["base"], [FIRST]),
    ],
    ids=["name", "alias", "several", "none"],
)
def test_only_what_is_allowed_may_be_asked(fresh, allow, may, may_not):
    model, registry = fresh
    with running(model, allow=allow) as server:
        for name in may_not:
            assert error_of(server.post(body(name)))[:2] == (404, "model_not_found")
        assert registry.asked == []
        for name in may:
            assert server.ask(name)


def test_a_name_that_is_not_there_is_looked_for_once_in_a_while(fresh):
    model, registry = fresh
    now = [0.0]
    with running(model, allow=["*"], known_seconds=10) as server, ThreadPoolExecutor(8) as pool:
        server.service.catalog._clock = lambda: now[0]
        registry.waits.clear()
        asked = [pool.submit(server.post, body("testing/none")) for _ in range(8)]
        wait_for(lambda: registry.asked)
        registry.waits.set()
        found = [error_of(one.result()) for one in asked]
        assert {one[:3] for one in found} == {(404, "model_not_found", "model")}
        for _ in range(20):
            assert error_of(server.post(body("testing/none")))[0] == 404
        assert registry.asked == ["testing/none@latest"]
        now[0] = 10.0
        assert error_of(server.post(body("testing/none")))[0] == 404
        assert len(registry.asked) == 2
    assert server.service.metrics.label(None) == "unknown"
    assert b"testing/none" not in server.service.metrics.text()


def test_who_asks_for_what_is_not_there_learns_of_nothing_else(fresh, registry_folder):
    model, _ = fresh
    with running(model, allow=["testing/fi*"]) as server:
        for name in ("testing/fix", "testing/first@other", "testing/first@9"):
            message = error_of(server.post(body(name)))[3]
            assert not any(secret in message for secret in (str(registry_folder), "second", "prod"))


def test_many_that_ask_for_one_wait_for_the_same(fresh):
    model, registry = fresh
    with running(model, allow=["*"]) as server, ThreadPoolExecutor(8) as pool:
        assert len({one.result() for one in [pool.submit(server.ask, SECOND) for _ in range(8)]}) == 1
    assert registry.asked == [SECOND]


def test_requests_for_loaded_adapters_do_not_wait_for_a_load(fresh):
    model, registry = fresh
    with running(model, [], allow=["*"]) as server, ThreadPoolExecutor(16) as pool:
        wanted = server.ask(FIRST)
        registry.waits.clear()
        asked = [pool.submit(server.post, body(f"testing/none{number}")) for number in range(8)]
        wait_for(lambda: len(registry.asked) >= 3 and len(server.service.catalog._loading) == 8)
        waiting = error_of(server.post(body("testing/other")))  # the ninth
        assert waiting[:2] == (429, "loading")
        assert server.ask(FIRST) == wanted
        registry.waits.set()
        assert {one.result().status_code for one in asked} == {404}


def test_a_registry_that_is_down_is_no_fault_of_the_client(fresh, caplog):
    model, registry = fresh
    with running(model, allow=["*"], known_seconds=0.01) as server:
        wanted = server.ask(FIRST)
        registry.fails = StoreError("/secret/place is away")
        response = server.post(body(SECOND))
        assert error_of(response)[:2] == (503, "registry_unavailable") and "retry-after" in response.headers
        assert "secret" not in response.text and "/secret/place is away" in caplog.text
        assert server.ask(FIRST) == wanted
        assert ids(server) == ["base", FIRST]
        registry.fails = None
        wait_for(lambda: server.post(body(SECOND)).status_code == 200)


def test_the_error_of_an_adapter_that_cannot_be_loaded_hides_the_details(fresh, monkeypatch, caplog):
    from finetune.errors import IntegrityError

    model, _ = fresh

    def broken(*args, **options):
        raise IntegrityError("/secret/place: other bytes")

    monkeypatch.setattr("finetune.serving.switcher.verify", broken)
    with running(model, allow=["*"]) as server:
        found = error_of(server.post(body(FIRST)))
    assert found[:2] == (503, "adapter_unavailable") and "IntegrityError" in found[3] and "secret" not in found[3]
    assert "/secret/place: other bytes" in caplog.text


def test_what_went_for_room_comes_again(vlm, registry_folder):
    size = vlm.add(FIRST).num_bytes
    model = VisionLanguageModel(vlm.base, registry=AdapterRegistry(registry_folder), max_bytes=int(size * 2.6))
    with running(model, allow=["*"]) as server:
        first = server.ask(FIRST)
        for ref in (SECOND, DORA, FIRST, SECOND):
            assert server.ask(ref)
            assert model.switcher.num_bytes <= size * 2.6
        assert server.ask(FIRST) == first


def test_an_alias_that_moves_is_followed(vlm, registry_folder, tmp_path):
    shutil.copytree(registry_folder, tmp_path / "registry")
    registry = AdapterRegistry(tmp_path / "registry")
    model = VisionLanguageModel(vlm.base, registry=registry, alias_seconds=0.0)
    with running(model, [FIRST]) as server:
        before = server.post(body(FIRST)).json()
        made = registry_folder.parent / "second"
        other = tmp_path / "renamed"
        shutil.copytree(made, other)
        rename(other, "testing", "first")
        registry.publish(other, aliases=["prod"])
        after = server.post(body(FIRST)).json()
        second = vlm.add(SECOND)
        with vlm.using(second):
            assert after["choices"][0]["message"]["content"] == vlm.ask(None, "What color is it?")
    assert before["system_fingerprint"] != after["system_fingerprint"]


def test_an_alias_of_an_older_version_is_listed_and_one_of_a_yanked_version_is_not(vlm, registry_folder, tmp_path):
    shutil.copytree(registry_folder, tmp_path / "registry")
    registry = AdapterRegistry(tmp_path / "registry")
    shutil.copytree(registry_folder.parent / "second", tmp_path / "renamed")
    rename(tmp_path / "renamed", "testing", "first")
    registry.publish(tmp_path / "renamed", aliases=["canary"])
    registry.yank("testing/second@1")
    with running(VisionLanguageModel(vlm.base, registry=registry), allow=["testing/first", SECOND]) as server:
        assert ids(server) == ["base", *(f"testing/first@{alias}" for alias in ("canary", "latest", "prod"))]
        for name in ids(server):
            assert server.ask(name)


def test_an_adapter_that_cannot_be_read_hides_no_other(vlm, registry_folder, tmp_path, caplog):
    shutil.copytree(registry_folder, tmp_path / "registry")
    registry = AdapterRegistry(tmp_path / "registry")
    log = tmp_path / "registry" / "names" / "testing" / "third" / "log"
    whole = [f"testing/{name}@{alias}" for name in ("first", "prompted", "second") for alias in ("latest", "prod")]
    with running(VisionLanguageModel(vlm.base, registry=registry), allow=["*"], known_seconds=0) as server:
        assert len(ids(server)) == 9
        newest = max(log.iterdir())
        kept, stat = newest.read_bytes(), newest.stat()
        for _ in range(2):
            newest.write_bytes(b"garbage" + kept[7:])
            os.utime(newest, ns=(stat.st_atime_ns, stat.st_mtime_ns))  # so that the index knows it, too
            for _ in range(3):
                assert ids(server) == ["base", *whole]
            newest.write_bytes(kept)
            assert len(ids(server)) == 9
        (tmp_path / "registry" / "registry.json").write_bytes(b"garbage")
        assert ids(server) == ["base"]
    logged = [
        record.getMessage().split(":")[0] for record in caplog.records if record.name == "finetune.server.catalog"
    ]
    third = "testing/third cannot be read and is not listed"
    assert logged == [third, third, "the registry cannot be read and is not listed"]


def rename(folder, namespace, name):
    """Give a saved adapter another name."""
    from finetune.adapters.manifest import MANIFEST_NAME, AdapterManifest

    manifest = AdapterManifest.parse((folder / MANIFEST_NAME).read_bytes(), source=MANIFEST_NAME)
    renamed = AdapterManifest.model_validate(manifest.model_dump() | {"namespace": namespace, "name": name})
    (folder / MANIFEST_NAME).write_bytes(renamed.to_bytes())


def test_labels_of_metrics_are_bounded(vlm):
    with running(vlm) as server:
        metrics = server.service.metrics
        labels = {metrics.label(f"testing/a{number}@prod") for number in range(500)}
    assert len(labels) == 101 and "other" in labels
