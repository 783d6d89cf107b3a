"""Writers that die, stores that fail or lose their answer, and many writers at once."""

import concurrent.futures
import multiprocessing
import os
import uuid
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from finetune.adapters.manifest import sha256_hex
from finetune.registry import AdapterRegistry, verify
from finetune.registry.log import commits
from finetune.registry.log.links import check_link
from finetune.registry.storage.store import AlreadyExists
from tests.registry.faulty import Interfering, Killed, OneDeath
from tests.registry.folders import same


def _dies(registry, number, folder, **options) -> bool:
    """Publish with a store that dies after its ``number``-th call; False when it made fewer."""
    dying = AdapterRegistry(registry.location)
    dying.store = Interfering(dying.store, OneDeath(number))
    try:
        dying.publish(folder, **options)
    except Killed:
        return True
    return False


def test_a_publish_that_dies_is_whole_or_absent_and_can_be_tried_again(make_adapter, tmp_path, no_sync):
    older, folder = make_adapter(seed=0), make_adapter(seed=1)
    for number in range(100):
        registry = AdapterRegistry(tmp_path / f"registry{number}")
        registry.publish(older)
        options = {"aliases": ["prod"], "txn": uuid.uuid4().hex}
        died = _dies(registry, number, folder, **options)
        (newest,) = registry.list()
        assert newest.version in ((1, 2) if died else (2,))
        assert same(registry.pull(newest.ref), folder if newest.version == 2 else older)
        assert verify(registry).problems == []
        again = registry.publish(folder, **options)
        assert (again.version, again.aliases) == (2, ("latest", "prod"))
        assert verify(registry).problems == []
        if not died:
            break
    assert number >= 8


def test_a_first_publish_that_dies(make_adapter, tmp_path, no_sync):
    folder = make_adapter()
    for number in range(100):
        registry = AdapterRegistry(tmp_path / f"registry{number}")
        died = _dies(registry, number, folder)
        assert [v.ref for v in registry.list()] in ([["medical/brain-mri@1"], []][: 1 + died])
        registry.publish(folder)
        assert verify(registry).problems == []
        if not died:
            break
    assert number >= 8


def test_lost_answers_make_no_second_version(registry, make_adapter):
    def lose(verb, key):
        if verb == "put" and not key.startswith("blobs/"):  # which are not created, but written
            raise AlreadyExists(key)

    registry.store = Interfering(registry.store, lose)
    assert registry.publish(make_adapter()).version == 1
    assert registry.alias("medical/brain-mri", "prod", 1).version == 1
    assert len(registry.log("medical/brain-mri")) == 2


def test_a_link_whose_answer_is_lost_makes_no_second_version(registry, make_adapter, monkeypatch):
    """A network file system asks again, and is told that the name is taken: by itself."""
    real = os.link

    def twice(*args):
        real(*args)
        real(*args)

    monkeypatch.setattr(os, "link", twice)
    assert registry.publish(make_adapter(), aliases=["prod"]).version == 1
    assert registry.alias("medical/brain-mri", "test", 1).version == 1
    assert [c.op for c in registry.log("medical/brain-mri")] == ["publish", "alias"]
    assert verify(registry).problems == []


def test_clocks_that_are_a_year_off_change_no_order(registry, make_adapter, monkeypatch):
    folders = [make_adapter(seed=n) for n in range(4)]
    for folder, days in zip(folders, (365, -365, 730, 0), strict=True):
        off = timedelta(days=days)

        class Clock(datetime):
            @classmethod
            def now(cls, tz=None, off=off):
                return datetime.now(tz) + off

        monkeypatch.setattr(commits, "datetime", Clock)
        registry.publish(folder)
        for path in Path(registry.location).rglob("*.json"):
            then = (datetime.now(UTC) + off).timestamp()
            os.utime(path, (then, then))
    log = registry.log("medical/brain-mri")
    assert [c.version for c in log] == [1, 2, 3, 4] and [c.time for c in log] != sorted(c.time for c in log)
    newest = AdapterRegistry(registry.location)
    assert newest.resolve("medical/brain-mri").version == newest.list()[0].version == 4
    assert verify(registry).problems == []


def _publish_all(location: str, folders: list[str]) -> list[int]:
    registry = AdapterRegistry(location)
    return [registry.publish(folder, aliases=[f"by-{os.getpid()}"]).version for folder in folders]


@pytest.mark.distributed
def test_processes_that_publish_at_once_lose_nothing(registry, make_adapter):
    """Eight processes, sixty publishes each, one name."""
    folders = [str(make_adapter(seed=n)) for n in range(480)]
    shares = [folders[n::8] for n in range(8)]
    with concurrent.futures.ProcessPoolExecutor(8, multiprocessing.get_context("spawn")) as pool:
        versions = list(pool.map(_publish_all, [registry.location] * 8, shares))
    assert sorted(sum(versions, [])) == list(range(1, 481)), "each writer was told a version of its own"
    log = registry.log("medical/brain-mri")
    assert [c.seq for c in log] == [c.version for c in log] == list(range(1, 481))
    assert all(check_link(entry, before) == [] for entry, before in zip(log, [None, *log], strict=False))
    wanted = {folder: sha256_hex(Path(folder, "manifest.json").read_bytes()) for folder in folders}
    for share, published in zip(shares, versions, strict=True):
        assert [log[version - 1].manifest for version in published] == [wanted[folder] for folder in share]
    assert 2 <= len(log[-1].aliases) <= 9  # latest, and one of each process that came to work
    assert verify(registry).problems == []
    print(f"{len(log)} versions by {len(log[-1].aliases) - 1} processes")


def _change_all(location: str, verb: str) -> None:
    registry, name = AdapterRegistry(location), "medical/brain-mri"
    for number in range(1, 11):
        if verb == "alias":
            registry.alias(name, "prod", number)
        elif verb == "yank":
            registry.yank(f"{name}@{number + 10}", reason=f"number {number}")
        else:
            registry.rollback(name, "test", to=number)


def test_processes_that_change_one_adapter_at_once_lose_nothing(registry, make_adapter):
    folder = make_adapter()
    for _ in range(20):
        registry.publish(folder, aliases=["test"])
    verbs = ["alias", "yank", "rollback"]
    with concurrent.futures.ProcessPoolExecutor(3, multiprocessing.get_context("spawn")) as pool:
        list(pool.map(_change_all, [registry.location] * 3, verbs))
    log = registry.log("medical/brain-mri")
    assert [c.op for c in log[20:]].count("alias") == [c.op for c in log[20:]].count("rollback") == 10
    assert log[-1].yanked == {str(number + 10): f"number {number}" for number in range(1, 11)}
    assert log[-1].aliases == {"latest": 10, "prod": 10, "test": 10}
    assert verify(registry).problems == []
