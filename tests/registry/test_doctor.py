import argparse
import errno
import json
import os
import re
import time
from datetime import timedelta

import pytest

from finetune.errors import StoreError
from finetune.registry import AdapterRegistry, diagnose
from finetune.registry import cli as commands
from finetune.registry.maintenance import doctor
from finetune.registry.storage import object_store, trial
from finetune.registry.storage.memory import MemoryStore
from finetune.registry.storage.store import ObjectMeta
from finetune.registry.storage.trial import check_create
from tests.registry.faulty import Interfering
from tests.servers.fake_s3 import fake_s3

COMMON = ["write", "read after write", "create", "create at once", "overwrite", "list", "delete", "clock"]
IN_FOLDERS = ["hard links", "free space", "leftovers"]


def _verdicts(registry):
    return {finding.probe: finding.verdict for finding in diagnose(registry)}


def _text(registry, probe):
    (text,) = (finding.text for finding in diagnose(registry) if finding.probe == probe)
    return text


def test_a_good_place_is_fit_and_left_as_it_was(location, make_adapter):
    registry = AdapterRegistry(location)
    probes = COMMON + (IN_FOLDERS if "://" not in location else [])
    assert _verdicts(registry) == dict.fromkeys(probes, "ok")
    assert list(registry.store.list()) == []
    registry.publish(make_adapter())
    before = sorted(meta.key for meta in registry.store.list())
    assert set(_verdicts(registry).values()) == {"ok"}
    assert sorted(meta.key for meta in registry.store.list()) == before


def test_a_folder_that_was_not_there_is_not_there_afterwards(tmp_path):
    _verdicts(AdapterRegistry(tmp_path / "not" / "yet"))
    assert not (tmp_path / "not").exists()
    (tmp_path / "there").mkdir()
    _verdicts(AdapterRegistry(tmp_path / "there"))
    assert os.listdir(tmp_path / "there") == []


# Stores that lie.


class Overwriting(MemoryStore):
    """Takes a create for a plain write."""

    def put(self, key, data, *, mode="create"):
        super().put(key, data, mode="overwrite")


class Racy(MemoryStore):
    """Looks first and writes then, as a gateway over a plain file system may."""

    def put(self, key, data, *, mode="create"):
        if mode == "create" and any(meta.key == key for meta in self.list()):
            super().put(key, data, mode="create")
        time.sleep(0.02)
        super().put(key, data, mode="overwrite")


class Stale(MemoryStore):
    """Answers reads from a cache."""

    def get(self, key):
        file = super().get(key)
        if "/read-3" in key:
            file.read()
        return file


class Refusing(MemoryStore):
    """Refuses a second create, but has written by then."""

    def put(self, key, data, *, mode="create"):
        try:
            super().put(key, data, mode=mode)
        except StoreError:
            super().put(key, data, mode="overwrite")
            raise


class Unlisted(MemoryStore):
    """Lists late."""

    def list(self, prefix=""):
        return iter(sorted(super().list(prefix), key=lambda meta: meta.key)[1:])


class Undeleted(MemoryStore):
    """Deletes late."""

    def delete(self, key):
        pass


class WriteOnceStore(MemoryStore):
    """Keeps what was first."""

    def put(self, key, data, *, mode="create"):
        if mode == "create" or not any(meta.key == key for meta in self.list()):
            super().put(key, data, mode=mode)


@pytest.mark.parametrize(
    ("kind", "probe", "text"),
    [
        (Overwriting, "create", "a second create was not refused. Two writers could overwrite each other here"),
        (
            Racy,
            "create at once",
            "of 8 creates of one object at once exactly one must succeed, but [2-8] did. Two writers",
        ),
        (Refusing, "create", "a second create was not refused. Two writers"),
        (Stale, "read after write", "a new object was read with other bytes than were written"),
        (WriteOnceStore, "overwrite", "an object that was overwritten still held b'one'"),
        (Unlisted, "list", "1 of 3 new objects were not listed, so gc and verify would miss them"),
        (Undeleted, "delete", "an object that was deleted was still there"),
    ],
)
def test_a_store_that_does_not_keep_its_promises_is_found(kind, probe, text):
    registry = AdapterRegistry("memory://")
    registry.store = kind()
    failed = {finding.probe: finding.text for finding in diagnose(registry) if finding.verdict == "failed"}
    assert probe in failed
    assert re.match(text, failed[probe])


@pytest.mark.parametrize("kind", [Overwriting, Racy, Refusing])
def test_the_first_publish_into_a_store_that_lies_is_refused(kind, make_adapter):
    registry = AdapterRegistry("memory://")
    registry.store = kind()
    with pytest.raises(StoreError, match="Two writers could overwrite each other .* See `finetune registry doctor`"):
        registry.publish(make_adapter())
    assert list(registry.store.list()) == []


def test_a_server_that_ignores_conditions_is_refused_before_anything_is_there(monkeypatch, make_adapter):
    with fake_s3() as (server, environment):
        for name, value in environment.items():
            monkeypatch.setenv(name, value)
        server.ignores_conditions = True
        registry = AdapterRegistry("s3://bucket/registry")
        with pytest.raises(StoreError, match="a second create was not refused"):
            registry.publish(make_adapter())
        assert server.objects == {}
        verdicts = _verdicts(registry)
        assert verdicts["create"] == verdicts["create at once"] == "failed"
        assert server.objects == {}
        server.ignores_conditions = False
        assert registry.publish(make_adapter(seed=1)).version == 1
        assert _verdicts(registry) == dict.fromkeys(COMMON, "ok")
        server.log.clear()
        registry.publish(make_adapter(seed=2))
        assert not [key for _, key in server.log if "doctor" in key], "only the first publish asks"


def test_a_lost_answer_is_no_lie(monkeypatch):
    monkeypatch.setitem(object_store._RETRY, "backoff", {"init_backoff": timedelta(milliseconds=1)})
    with fake_s3() as (server, environment):
        for name, value in environment.items():
            monkeypatch.setenv(name, value)
        registry = AdapterRegistry("s3://bucket")
        for number in range(4):
            server.losses = number
            check_create(registry.store)


# What the system refuses.


def test_what_cannot_be_written_is_reported_once():
    def full(verb, key):
        if verb == "put":
            raise StoreError("cannot write: No space left on device. The disk is full")

    registry = AdapterRegistry("memory://")
    registry.store = Interfering(MemoryStore(), before=full)
    (finding,) = diagnose(registry)
    assert (finding.probe, finding.verdict) == ("write", "failed")
    assert finding.text == "cannot write: No space left on device. The disk is full"


def test_a_folder_without_hard_links(tmp_path, monkeypatch):
    def refuse(*args, **kwargs):
        raise OSError(errno.EOPNOTSUPP, os.strerror(errno.EOPNOTSUPP))

    monkeypatch.setattr(os, "link", refuse)
    verdicts = _verdicts(AdapterRegistry(tmp_path / "registry"))
    assert verdicts == {"write": "failed", "hard links": "failed", "free space": "ok", "leftovers": "ok"}
    assert not (tmp_path / "registry").exists()


def test_a_place_that_is_no_folder(tmp_path):
    (tmp_path / "file").write_text("x")
    registry = AdapterRegistry(tmp_path / "file" / "below")
    verdicts = _verdicts(registry)
    assert verdicts == {"write": "failed", "hard links": "failed", "free space": "ok", "leftovers": "ok"}
    for probe in ("write", "hard links"):
        assert "A folder is needed, but a file has its path" in _text(registry, probe)
    assert (tmp_path / "file").read_text() == "x"


def test_a_clock_that_is_off_is_a_warning(tmp_path):
    class Off(MemoryStore):
        days = 0

        def head(self, key):
            found = super().head(key)
            return ObjectMeta(key=key, size=found.size, modified=found.modified + timedelta(days=self.days))

    registry = AdapterRegistry("memory://")
    registry.store = Off()
    for days, text in ((365, "31536000 s ahead of this"), (-365, "31535999 s behind this")):
        registry.store.days = days
        (finding,) = (finding for finding in diagnose(registry) if finding.verdict != "ok")
        assert (finding.probe, finding.verdict) == ("clock", "warning")
        assert text in finding.text


def test_little_space_and_leftovers_are_warnings(registry, make_adapter, monkeypatch):
    registry.publish(make_adapter())
    folder = registry.store.root / "blobs"
    (folder / ".tmp-0").write_bytes(b"12345")
    (folder / ".tmp-1").write_bytes(b"6")
    long_ago = time.time() - 3 * 86400
    os.utime(folder / ".tmp-0", (long_ago, long_ago))
    monkeypatch.setattr(doctor, "LEAST_FREE", 1 << 60)
    assert _verdicts(registry) | {"free space": "warning", "leftovers": "warning"} == _verdicts(registry)
    assert "1 temporary files of writers that were most likely killed, the oldest 3.0 days old (6 bytes" in _text(
        registry, "leftovers"
    )
    assert "GiB are free. Make room" in _text(registry, "free space")


def test_what_a_killed_doctor_left_is_thrown_away_after_a_day(monkeypatch):
    registry = AdapterRegistry("memory://")
    registry.store.put("doctor/old/write", b"")
    _verdicts(registry)
    assert [meta.key for meta in registry.store.list()] == ["doctor/old/write"], "it may be at work"
    monkeypatch.setattr(trial, "ABANDONED", timedelta(seconds=-1))
    _verdicts(registry)
    assert list(registry.store.list()) == []


def _command(capsys, *words):
    parser = argparse.ArgumentParser(prog="finetune")
    commands.add_parser(parser.add_subparsers(required=True))
    args = parser.parse_args(["registry", "doctor", *words])
    return args.run(args), capsys.readouterr().out


def test_the_command_reports_whether_the_place_is_fit(tmp_path, monkeypatch, capsys):
    where = ("--registry", str(tmp_path / "registry"))
    code, out = _command(capsys, *where)
    header, *rows, conclusion = out.splitlines()
    assert (code, header.split()[:2], len(rows)) == (0, ["PROBE", "VERDICT"], len(COMMON) + len(IN_FOLDERS))
    assert conclusion == f"{tmp_path / 'registry'} is fit to be shared"
    # Late enough that every thread has seen that the key is free.
    monkeypatch.setattr(os, "link", lambda *paths: time.sleep(0.2) or os.replace(*paths))
    code, out = _command(capsys, *where, "--json")
    answer = json.loads(out)
    assert (code, answer["fit"], answer["location"]) == (1, False, str(tmp_path / "registry"))
    assert [finding["probe"] for finding in answer["findings"] if finding["verdict"] == "failed"] == ["create at once"]
    code, out = _command(capsys, *where)
    assert out.endswith("must not be shared by several writers\n")
