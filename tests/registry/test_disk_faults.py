"""A disk that refuses, at every single step of every change: an error with advice, and nothing half done."""

import builtins
import errno
import itertools
import os
import shutil
from pathlib import Path

import pytest

from finetune.errors import StoreError
from finetune.registry import AdapterRegistry, collect, verify

pytestmark = pytest.mark.usefixtures("no_sync")

NAME = "medical/brain-mri"
ADVICE = {
    errno.ENOSPC: "No space left on device. The disk is full: free some space there, or choose another folder",
    errno.EACCES: "Permission denied. Ask its owner for access, or choose another folder",
    errno.EIO: "Input/output error. Check that the disk is connected and healthy, then try again",
    errno.EROFS: "Read-only file system. It is mounted read-only: choose another folder",
}


class _File:
    """A file whose writing may fail."""

    def __init__(self, disk, file):
        self._disk, self._file = disk, file

    def __enter__(self):
        return self

    def __exit__(self, *error):
        self._file.close()

    def write(self, data):
        self._disk.step("write")
        return self._file.write(data)

    def flush(self):
        self._disk.step("flush")
        self._file.flush()

    def fileno(self):
        return self._file.fileno()


class _Disk:
    """Refuses the call of that number by which it would be changed, and all after it when that is ``lasting``."""

    def __init__(self, monkeypatch, number: int, code: int, *, lasting: bool):
        self.left, self.code, self.lasting = number, code, lasting
        self.refused: list[str] = []
        self.heal = monkeypatch.undo
        for name in ("fsync", "link", "replace", "unlink", "mkdir"):
            monkeypatch.setattr(os, name, self._refusing(name, getattr(os, name)))
        real = builtins.open

        def opening(path, mode="r", *args, **kwargs):
            if "x" not in mode:
                return real(path, mode, *args, **kwargs)
            self.step("open")
            return _File(self, real(path, mode, *args, **kwargs))

        monkeypatch.setattr(builtins, "open", opening)

    def _refusing(self, name, real):
        def call(*args, **kwargs):
            self.step(name)
            return real(*args, **kwargs)

        return call

    def step(self, name):
        self.left -= 1
        if self.left == -1 or (self.left < 0 and self.lasting):
            self.refused.append(name)
            raise OSError(self.code, os.strerror(self.code))


def _files(location) -> set[Path]:
    return {path.relative_to(location) for path in Path(location).rglob("*") if path.is_file()}


def _cases(monkeypatch, way, template, places):
    """Yield, for each step at which it may fail, a copy of the template and the disk that fails under it."""
    code, lasting = way
    for number in range(200):
        location = places / str(number)
        shutil.copytree(template, location)
        with monkeypatch.context() as patch:
            disk = _Disk(patch, number, code, lasting=lasting)
            yield AdapterRegistry(location), disk
        shutil.rmtree(location)
        if not disk.refused:
            assert number >= 8
            return


@pytest.fixture(
    params=[
        (errno.EIO, False),
        (errno.ENOSPC, True),
        *(
            pytest.param(way, marks=pytest.mark.slow)
            for way in itertools.product(ADVICE, (False, True))
            if way not in ((errno.EIO, False), (errno.ENOSPC, True))
        ),
    ],
    ids=lambda way: f"{errno.errorcode[way[0]]}-{'from then on' if way[1] else 'once'}",
)
def way(request):
    """The error, and whether it is lasting."""
    return request.param


@pytest.fixture
def used(registry, make_adapter):
    for seed in range(2):
        registry.publish(make_adapter(seed=seed))
    registry.store.put(f"blobs/sha256/00/{'0' * 64}", b"abandoned")
    for path in Path(registry.location).rglob("*"):
        os.utime(path, (1e9, 1e9))
    return registry


def _try(disk, change) -> StoreError | None:
    """Make a change on a disk that fails, and then heals it; return the error, which has to be explained."""
    try:
        change()
    except StoreError as error:
        assert error.errno == disk.code and ADVICE[disk.code] in str(error) and str(error).startswith("cannot ")
        return error
    finally:
        disk.heal()
    return None


def _check_that_nothing_is_left(registry, disk) -> None:
    assert verify(registry).problems == []
    if "unlink" not in disk.refused:
        assert not [path for path in _files(registry.location) if path.name.startswith(".tmp-")]


def test_publish(used, way, make_adapter, monkeypatch, tmp_path):
    folder, tried, refused = make_adapter(seed=5), 0, 0
    for registry, disk in _cases(monkeypatch, way, used.location, tmp_path / "places"):
        txn = registry.new_txn(NAME)
        error = _try(disk, lambda registry=registry, txn=txn: registry.publish(folder, txn=txn))
        fresh = AdapterRegistry(registry.location)
        version = fresh.resolve(NAME).version
        assert version == 3 or (error is not None and version == 2), "success is never told for nothing"
        if version == 3 and error is not None:
            assert disk.refused[0] in ("fsync", "unlink"), "only a name that may not be lasting is there all the same"
        _check_that_nothing_is_left(fresh, disk)
        assert fresh.publish(folder, txn=txn).version == 3 and verify(fresh).problems == []
        tried += 1
        refused += error is not None
    print(f"publish on a disk that fails: {tried} times, refused {refused} times")
    assert refused > 30


def test_alias(used, way, monkeypatch, tmp_path):
    refused = 0
    for registry, disk in _cases(monkeypatch, way, used.location, tmp_path / "places"):
        error = _try(disk, lambda registry=registry: registry.alias(NAME, "prod", 1))
        fresh = AdapterRegistry(registry.location)
        entries = len(fresh.log(NAME))
        assert entries == 3 or (error is not None and entries == 2)
        _check_that_nothing_is_left(fresh, disk)
        assert fresh.alias(NAME, "prod", 1).version == 1 and len(fresh.log(NAME)) == 3
        refused += error is not None
    assert refused > 8 or not way[1], "an entry is written twice before it is given up"


def test_gc(used, way, monkeypatch, tmp_path):
    needed, refused = _files(used.location) - {Path(f"blobs/sha256/00/{'0' * 64}")}, 0
    for registry, disk in _cases(monkeypatch, way, used.location, tmp_path / "places"):
        error = _try(disk, lambda registry=registry: collect(registry, delete=True))
        assert needed <= _files(registry.location)
        _check_that_nothing_is_left(registry, disk)
        assert "unlink" in disk.refused or not [p for p in _files(registry.location) if p.parts[0] == "gc"]
        collect(registry, delete=True)
        assert needed == {path for path in _files(registry.location) if path.parts[0] != "gc"}
        refused += error is not None
    assert refused > 8


def test_a_store_that_cannot_be_listed_or_read_is_not_cleaned(used, monkeypatch):
    def refuse(*args, **kwargs):
        raise OSError(errno.EACCES, os.strerror(errno.EACCES))

    before = _files(used.location)
    for name in ("scandir", "stat"):
        with monkeypatch.context() as patch:
            patch.setattr(os, name, refuse)
            with pytest.raises(StoreError, match="Permission denied. Ask its owner for access"):
                collect(used, delete=True)
        assert _files(used.location) - {p for p in _files(used.location) if p.parts[0] == "gc"} == before
