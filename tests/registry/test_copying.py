"""Copies of adapters with their history between registries: equal, continued, refused, and broken off."""

import os
import shutil
import time
from datetime import timedelta
from pathlib import Path

import pytest

from finetune.errors import ConflictError, IntegrityError, NotFoundError
from finetune.registry import AdapterRegistry, collect, verify
from finetune.registry.storage.location import is_registry
from finetune.registry.storage.store import AlreadyExists
from finetune.registry.transfer.copying import Copied, copy_adapter, copy_adapters, names_in
from tests.registry.faulty import Interfering, Killed, OneDeath
from tests.registry.folders import forge, same

pytestmark = pytest.mark.usefixtures("no_sync")
NAME = "medical/brain-mri"


@pytest.fixture
def source(registry, make_adapter):
    """Three versions and all that can happen to them."""
    for seed in range(3):
        registry.publish(make_adapter(seed=seed), aliases=["prod"] if seed < 2 else [])
    registry.rollback(NAME, "prod")
    registry.yank(f"{NAME}@3", reason="wrong rows")
    return registry


@pytest.fixture
def target(tmp_path):
    return AdapterRegistry(tmp_path / "target")


def _files(registry, below=""):
    root = Path(registry.location)
    return {p.relative_to(root).as_posix(): p.read_bytes() for p in (root / below).rglob("*") if p.is_file()}


def _copy(source, target, name=NAME) -> Copied:
    return copy_adapter(source.store, target.store, name)


def test_a_copy_is_equal_to_the_byte(source, target):
    assert _copy(source, target) == Copied(name=NAME, entries=5, versions=3, blobs=8, bytes=_size(source))
    assert _files(target, "names") == _files(source, "names")
    assert _files(target, "blobs") == _files(source, "blobs")
    assert verify(target).problems == []
    assert target.resolve(f"{NAME}@prod").version == 1 and target.resolve(f"{NAME}@3").yanked == "wrong rows"
    assert same(target.pull(f"{NAME}@2"), source.pull(f"{NAME}@2"))


def _size(registry):
    return sum(map(len, _files(registry, "blobs").values()))


def test_a_registry_keeps_what_is_its_own(source, target, make_adapter):
    target.publish(make_adapter("retail/shoes"))
    own = _files(target)
    _copy(source, target)
    assert own.items() <= _files(target).items()
    assert _files(target)["registry.json"] != _files(source)["registry.json"]


def test_what_is_there_already_is_continued(source, target, make_adapter):
    _copy(source, target)
    before = _files(target)
    assert _copy(source, target) == Copied(name=NAME, entries=0, versions=0, blobs=0, bytes=0)
    assert _files(target) == before
    source.publish(make_adapter(seed=7))
    source.alias(NAME, "prod", 4)
    done = _copy(source, target)
    assert (done.entries, done.versions, done.blobs) == (2, 1, 4)
    assert _files(target, "names") == _files(source, "names")
    assert _copy(target, source).entries == 0


def test_a_target_that_is_ahead_stays_as_it_is(source, target, make_adapter):
    _copy(source, target)
    target.publish(make_adapter(seed=7))
    before = _files(target)
    assert _copy(source, target).entries == 0
    assert _files(target) == before
    assert _copy(target, source).versions == 1


@pytest.mark.parametrize("common", range(5))
def test_histories_that_part_are_refused(source, target, make_adapter, common):
    """They have the first ``common`` of five entries in common."""
    _copy(source, target)
    for entry in Path(target.location, "names", NAME, "log").iterdir():
        if int(entry.stem) > common:
            entry.unlink()
    target = AdapterRegistry(target.location)
    for seed in range(common, 6):
        target.publish(make_adapter(seed=100 + seed))
    before = _files(target)
    with pytest.raises(
        ConflictError,
        match=rf"{NAME}: source and target must have the same history, "
        rf"but differ from entry {common + 1} on: in the source .* by ",
    ):
        _copy(source, target)
    with pytest.raises(ConflictError, match=f"differ from entry {common + 1} on:"):
        _copy(target, source)
    assert _files(target) == before


def test_one_refused_adapter_keeps_no_other_away(source, target, make_adapter):
    source.publish(make_adapter("retail/shoes"))
    target.publish(make_adapter(seed=9))
    copied, refused = copy_adapters(source.store, target.store, names_in(source.store))
    assert [done.name for done in copied] == ["retail/shoes"]
    assert len(refused) == 1 and NAME in str(refused[0])


def test_what_is_not_there_is_named(source, target):
    with pytest.raises(NotFoundError, match=r"no adapter 'medical/brain-mry' to copy\. Did you mean 'medical/brain"):
        _copy(source, target, "medical/brain-mry")
    assert not Path(target.location).exists()


def _damage(path: Path) -> None:
    data = path.read_bytes()
    path.write_bytes(bytes([data[0] ^ 1]) + data[1:])


def test_a_damaged_source_gives_no_version_that_is_damaged(source, tmp_path):
    root = Path(source.location)
    for path in sorted(p for p in (root / "blobs").rglob("*") if p.is_file()):
        target = AdapterRegistry(tmp_path / f"target-{path.name[:12]}")
        whole = path.read_bytes()
        _damage(path)
        with pytest.raises(IntegrityError, match=path.name):
            _copy(source, target)
        path.unlink()
        with pytest.raises(IntegrityError, match=path.name):
            _copy(source, target)
        assert target.list() == []
        path.write_bytes(whole)
        assert _copy(source, target).versions == 3 and verify(target).problems == []


def test_a_broken_chain_is_not_copied(source, target):
    forge(Path(source.location, "names", NAME, "log", "000000000002.json"), actor="somebody@else")
    with pytest.raises(
        IntegrityError, match=r"000000000003.json: its `prev` must be the digest of the entry before it, and is not"
    ):
        _copy(source, target)
    assert target.list() == []


def test_a_summary_that_lies_is_not_copied(source, target, tmp_path):
    path = Path(source.location, "names", NAME, "log", "000000000001.json")
    for later in path.parent.iterdir():
        if later != path:
            later.unlink()
    forge(path, summary={"metrics": {"test": {"exact_match": 0.99}}})
    with pytest.raises(
        IntegrityError, match=r"its summary must be that in names/medical/brain-mri/log/000000000001.json, and differs"
    ):
        _copy(AdapterRegistry(source.location), target)


def test_a_damaged_file_of_the_target_is_mended(source, target):
    _copy(source, target)
    shutil.rmtree(Path(target.location, "names"))
    for path in Path(target.location, "blobs").rglob("*"):
        if path.is_file():
            _damage(path)
    assert _copy(source, AdapterRegistry(target.location)).blobs == 8
    assert verify(target).problems == []


@pytest.mark.parametrize("who", ["source", "target"])
def test_a_copy_that_dies_at_any_step_goes_on(source, tmp_path, who):
    """At every moment the target is whole, and holds a beginning of the history."""
    for number in range(200):
        target = AdapterRegistry(tmp_path / f"target{number}")
        stores = {"source": source.store, "target": target.store}
        stores[who] = Interfering(stores[who], OneDeath(number))
        try:
            copy_adapter(stores["source"], stores["target"], NAME)
            died = False
        except Killed:
            died = True
        began = AdapterRegistry(target.location)
        if died and began.list():
            assert verify(began).problems == []
        log = _files(began, "names")
        assert log.items() <= _files(source, "names").items()
        assert [int(Path(key).stem) for key in sorted(log)] == list(range(1, len(log) + 1)), "no gaps"
        assert _copy(source, began).entries == 5 - len(log)
        assert _files(began, "names") == _files(source, "names") and verify(began).problems == []
        if not died:
            break
    assert number >= 20


def test_lost_answers_do_no_harm(source, target):
    def lose(verb, key):
        if verb == "put":
            raise AlreadyExists(key)

    class Loses(Interfering):
        """A put that creates loses its answer."""

        def put(self, key, data, *, mode="create"):
            (super() if mode == "create" else self.store).put(key, data, mode=mode)

    assert copy_adapter(source.store, Loses(target.store, lose), NAME).entries == 5
    assert _files(target, "names") == _files(source, "names")


def test_who_writes_meanwhile_is_noticed(source, target, make_adapter):
    other, folder = AdapterRegistry(target.location), make_adapter(seed=50)

    def interfere(verb, key):
        if verb == "put" and key.endswith("1.json"):
            other.publish(folder)

    with pytest.raises(ConflictError, match="but differ from entry 1 on"):
        copy_adapter(source.store, Interfering(target.store, before=interfere), NAME)
    assert [v.ref for v in AdapterRegistry(target.location).list()] == [f"{NAME}@1"]
    assert verify(target).problems == []


@pytest.mark.parametrize("begun", ["nothing", "unnamed and old"])
def test_gc_of_the_target_takes_nothing_that_is_copied(source, tmp_path, begun):
    """It runs between any two steps of a copy."""
    for number in range(200):
        target = AdapterRegistry(tmp_path / f"target{number}")
        if begun != "nothing":
            _copy(source, target)
            shutil.rmtree(Path(target.location, "names"))
            for path in Path(target.location, "blobs").rglob("*"):
                os.utime(path, (time.time() - 30 * 86400,) * 2)
        left = iter(range(number, -1, -1))

        def interfere(verb, key, target=target, left=left):
            if next(left, None) == 0 and is_registry(target.store):
                collect(AdapterRegistry(target.location), grace=timedelta(days=2), delete=True)

        assert copy_adapter(source.store, Interfering(target.store, before=interfere), NAME).entries == 5
        assert verify(AdapterRegistry(target.location)).problems == []
        if next(left, None) is not None:
            break
    assert number >= 20


def test_what_disappeared_before_it_was_named_is_copied_again(source, target):
    """As when the machine slept for a day between the blobs and the entries, and gc came."""

    def interfere(verb, key):
        if verb == "put" and key.endswith("log/000000000005.json"):
            shutil.rmtree(Path(target.location, "blobs"))

    copy_adapter(source.store, Interfering(target.store, interfere), NAME)
    assert verify(target).problems == []


def test_a_copy_that_took_long_looks_again(source, tmp_path, monkeypatch):
    """Half a day for each blob that is written, so that all were written long before they are named."""
    now = [0.0]
    monkeypatch.setattr("finetune.registry.transfer.copying.time.monotonic", lambda: now[0])

    def looks_at_the_first_blob(seconds):
        calls = []

        def interfere(verb, key):
            calls.append((verb, key))
            if verb == "put" and key.startswith("blobs/") and len(calls) < 30:
                now[0] += seconds

        target = AdapterRegistry(tmp_path / f"target{seconds}")
        copy_adapter(source.store, Interfering(target.store, before=interfere), NAME)
        first_entry = next(n for n, call in enumerate(calls) if call[0] == "put" and call[1].startswith("names/"))
        first_blob = next(key for verb, key in calls if verb == "put" and key.startswith("blobs/"))
        return [key for _, key in calls[:first_entry]].count(first_blob)

    assert looks_at_the_first_blob(43200) > looks_at_the_first_blob(0)


def test_two_copies_at_once_make_one_history(source, target):
    started = []

    def interfere(verb, key):
        if verb == "put" and not started:
            started.append(key)
            _copy(source, AdapterRegistry(target.location))

    assert copy_adapter(source.store, Interfering(target.store, before=interfere), NAME).entries == 5
    assert _files(target, "names") == _files(source, "names")
