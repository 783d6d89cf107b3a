"""Real processes, really killed (SIGKILL) before every call by which they touch the disk."""

import multiprocessing
import os
import shutil
import signal
import uuid
from pathlib import Path

import pytest

from finetune.errors import NotFoundError
from finetune.registry import AdapterRegistry, collect, verify
from tests.registry.folders import same
from tests.registry.killing import NAME, VERBS, run_until

pytestmark = [
    pytest.mark.distributed,
    pytest.mark.usefixtures("no_sync"),
    pytest.mark.skipif(os.name == "nt", reason="Windows has no SIGKILL"),
]

DAY = 24 * 3600


@pytest.fixture(scope="module")
def processes():
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["tests.registry.killing"])
    return context


def _deaths(processes, verb, template: Path | None, folder: Path, places: Path):
    """Yield the registry, a copy of ``template``, after each death; the last after none."""
    for step in range(1000):
        location = places / str(step)
        if template is not None:
            shutil.copytree(template, location)
        process = processes.Process(target=run_until, args=(step, verb, str(location), str(folder)))
        process.start()
        process.join()
        died = process.exitcode == -signal.SIGKILL
        assert died or process.exitcode == 0
        yield AdapterRegistry(location), died
        shutil.rmtree(location)
        if not died:
            return


def _problems(registry) -> list[str]:
    try:
        return verify(registry).problems
    except NotFoundError:
        return []


def _keys(registry) -> set[str]:
    return {p.relative_to(registry.location).as_posix() for p in Path(registry.location).rglob("*") if p.is_file()}


def _age(registry) -> None:
    for path in Path(registry.location).rglob("*"):
        if path.is_file():
            then = path.stat().st_mtime - 8 * DAY
            os.utime(path, (then, then))


def _kept(registry) -> set[str]:
    """Return what is left once whatever the dead left is old enough to go."""
    _age(registry)
    collect(registry, delete=True)
    assert _problems(registry) == []
    return _keys(registry)


def _kept_without_deaths(template: Path | None, location: Path, folder: Path) -> set[str]:
    if template is not None:
        shutil.copytree(template, location)
    VERBS["publish"](AdapterRegistry(location), folder)
    return _kept(AdapterRegistry(location))


@pytest.fixture
def used(registry, make_adapter):
    """Three versions, an alias that was moved, and what an abandoned publish left a while ago."""
    for seed in range(3):
        registry.publish(make_adapter(seed=seed), aliases=["test"])
    registry.store.put(f"blobs/sha256/00/{'0' * 64}", b"abandoned")
    registry.store.put(f"blobs/sha256/11/{'1' * 64}", b"abandoned too")
    _age(registry)
    return registry


@pytest.mark.parametrize("first", [True, False])
def test_publish(processes, used, make_adapter, tmp_path, first):
    template, version = (None, 1) if first else (Path(used.location), 4)
    older, newer = used.pull(f"{NAME}@3"), make_adapter(seed=9)
    kept = _kept_without_deaths(template, tmp_path / "undisturbed", newer)
    number = wholes = 0
    for registry, died in _deaths(processes, "publish", template, newer, tmp_path / "places"):
        assert _problems(registry) == []
        versions = registry.list()
        assert [v.version for v in versions] in ([[version - 1] if version > 1 else [], [version]])
        for found in versions:
            whole = found.version == version
            wholes += died and whole
            assert same(registry.pull(found, tmp_path / f"pulled-{uuid.uuid4().hex}"), newer if whole else older)
            assert ("prod" in found.aliases) == whole
        again = VERBS["publish"](AdapterRegistry(registry.location), newer)
        assert (again.version, again.aliases) == (version, ("latest", "prod"))
        assert [v.version for v in registry.list()] == [version] and _problems(registry) == []
        assert _kept(registry) == kept
        number += died
    print(f"publish, {'first' if first else 'next'}: killed {number} times, the version was there {wholes} times")
    assert number >= 70 and wholes >= 3


@pytest.mark.parametrize("verb", ["alias", "rollback", "yank"])
def test_changes(processes, used, tmp_path, verb):
    before, number = len(used.log(NAME)), 0
    for registry, died in _deaths(processes, verb, Path(used.location), tmp_path, tmp_path / "places"):
        log = registry.log(NAME)
        assert len(log) in (before, before + 1) and _problems(registry) == []
        if verb != "rollback" or len(log) == before:  # a rollback that is done again goes one step further
            VERBS[verb](AdapterRegistry(registry.location), None)
        log = registry.log(NAME)
        assert len(log) == before + 1 and log[-1].op == verb and _problems(registry) == []
        number += died
    print(f"{verb}: killed {number} times")
    assert number >= 20


def test_gc(processes, used, make_adapter, tmp_path):
    needed = {key for key in _keys(used) if key[-64:] not in ("0" * 64, "1" * 64)}
    folder, number = make_adapter(seed=9), 0
    kept = _kept_without_deaths(Path(used.location), tmp_path / "undisturbed", folder)
    for registry, died in _deaths(processes, "gc", Path(used.location), tmp_path, tmp_path / "places"):
        assert needed <= _keys(registry) and _problems(registry) == []
        collect(AdapterRegistry(registry.location), delete=True)
        assert needed == {key for key in _keys(registry) if not key.startswith("gc/")}
        again = AdapterRegistry(registry.location).publish(folder, aliases=["prod"])
        assert again.version == 4, "a dead gc keeps nothing else from being published"
        assert _kept(registry) == kept
        number += died
    print(f"gc: killed {number} times")
    assert number >= 50
