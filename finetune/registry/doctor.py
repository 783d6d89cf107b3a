"""The check of whether a place is fit for a registry with many writers, by trials with temporary objects."""

import contextlib
import os
import shutil
import time
import uuid
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from finetune.errors import FinetuneError, StoreError
from finetune.registry.store import AlreadyExists, Store, exists, explain, read_all
from finetune.registry.stores.local import LocalStore

if TYPE_CHECKING:
    from finetune.registry.registry import AdapterRegistry

CREATORS = 8
MAX_BYTES = 1024  # of an object of a trial
CLOCK_SECONDS = 60  # that clocks may differ before it is worth a word
LEAST_FREE = 1 << 30  # bytes
OLD = timedelta(hours=1)  # what is written for longer has most likely been given up
ABANDONED = timedelta(days=1)  # trials of a doctor that was killed

_UNFIT = "Two writers could overwrite each other here without knowing, so nobody should publish into it."


@dataclass(frozen=True, kw_only=True)
class Finding:
    """The result of one trial.

    Attributes:
        probe: the name of the trial.
        verdict: ``failed`` when nobody should write here, or not everybody can.
        text: the observation, and what to do about it.
    """

    probe: str
    verdict: Literal["ok", "warning", "failed"]
    text: str


def diagnose(registry: "AdapterRegistry") -> list[Finding]:
    """Try out the store of a registry, which need not be there yet, and leave it as it was.

    A trial that cannot be made, as the store refuses something, is the last one.

    Returns:
        A finding for each trial; do not write there when one of them is ``failed``.
    """
    store, findings = registry.store, []
    folder = store.root if isinstance(store, LocalStore) else None
    with _trial(store, folder) as prefix:
        for probe, try_out in _PROBES.items():
            try:
                findings.append(try_out(store, prefix))
            except FinetuneError as error:
                findings.append(Finding(probe=probe, verdict="failed", text=str(error)))
                break
        if folder is not None:
            findings += [_hard_links(folder), _free_space(folder), _leftovers(folder)]
    return findings


def check_create(store: Store) -> None:
    """Refuse a store that lets two writers create the same object, one after the other or at once.

    Raises:
        StoreError: it lets them, or cannot be written.
    """
    with _trial(store, None) as prefix:
        for try_out in (_create, _create_at_once):
            finding = try_out(store, prefix)
            if finding.verdict == "failed":
                raise StoreError(f"{finding.text} See `finetune registry doctor`.")


@contextlib.contextmanager
def _trial(store: Store, folder: Path | None) -> Iterator[str]:
    """Yield a prefix for temporary objects, which are deleted at the end, with those that killed trials left."""
    prefix = f"doctor/{uuid.uuid4().hex}"
    new = [] if folder is None else [path for path in (folder, *folder.parents) if not os.path.exists(path)]
    try:
        yield prefix
    finally:
        # What cannot be listed or deleted has been reported by then.
        with contextlib.suppress(FinetuneError):
            found = list(store.list("doctor"))
            now = max((meta.modified for meta in found), default=datetime.now(UTC))
            for meta in found:
                if meta.key.startswith(prefix) or now - meta.modified > ABANDONED:
                    store.delete(meta.key)
        if folder is not None:
            below = sorted((folder / "doctor").rglob("*"), reverse=True)  # a folder after what it holds
            for path in (*below, folder / "doctor", *new):
                with contextlib.suppress(OSError):  # it holds something, is a file, or is not there
                    path.rmdir()


def _creates(store: Store, key: str, data: bytes) -> bool:
    try:
        store.put(key, data, mode="create")
    except AlreadyExists:
        # Ours all the same when the store wrote it, lost the answer, and was asked again.
        return _read(store, key) == data
    return True


def _read(store: Store, key: str) -> bytes:
    return read_all(store, key, max_bytes=MAX_BYTES)


def _write(store: Store, prefix: str) -> Finding:
    store.put(f"{prefix}/write", b"one", mode="create")
    return Finding(probe="write", verdict="ok", text="an object could be created")


def _read_after_write(store: Store, prefix: str) -> Finding:
    probe, key = "read after write", f"{prefix}/read"
    for number in range(5):
        data = b"%d" % number
        store.put(f"{key}-{number}", data, mode="create")
        if _read(store, f"{key}-{number}") != data or store.head(f"{key}-{number}").size != len(data):
            return Finding(probe=probe, verdict="failed", text=f"what was written was not what was read. {_UNFIT}")
    return Finding(probe=probe, verdict="ok", text="what was written was read at once")


def _create(store: Store, prefix: str) -> Finding:
    probe, key = "create", f"{prefix}/create"
    for data in (b"first", b"second"):
        if _creates(store, key, data) != (data == b"first"):
            text = "a second create was not refused" if data == b"second" else "a create of a new object was refused"
            return Finding(probe=probe, verdict="failed", text=f"{text}. {_UNFIT}")
    return Finding(probe=probe, verdict="ok", text="a second create was refused")


def _create_at_once(store: Store, prefix: str) -> Finding:
    probe, key = "create at once", f"{prefix}/at-once"
    with ThreadPoolExecutor(CREATORS) as pool:
        creators = [b"creator %d" % number for number in range(CREATORS)]
        won = [*pool.map(lambda data: _creates(store, key, data), creators)]
    if sum(won) != 1:
        text = f"of {CREATORS} creates of one object at once {sum(won)} succeeded, not one. {_UNFIT}"
        return Finding(probe=probe, verdict="failed", text=text)
    if (found := _read(store, key)) != creators[won.index(True)]:
        text = f"a create that was refused wrote {found!r} over the one that succeeded. {_UNFIT}"
        return Finding(probe=probe, verdict="failed", text=text)
    return Finding(probe=probe, verdict="ok", text=f"of {CREATORS} creates of one object at once one succeeded")


def _overwrite(store: Store, prefix: str) -> Finding:
    key = f"{prefix}/overwrite"
    for data in (b"one", b"another"):
        store.put(key, data, mode="overwrite")
    if (found := _read(store, key)) != b"another":
        return Finding(probe="overwrite", verdict="failed", text=f"an object that was overwritten still held {found!r}")
    return Finding(probe="overwrite", verdict="ok", text="an object could be replaced")


def _list(store: Store, prefix: str) -> Finding:
    keys = {f"{prefix}/list/{number}" for number in range(3)}
    for key in keys:
        store.put(key, b"", mode="create")
    missing = keys - {meta.key for meta in store.list(f"{prefix}/list")}
    if missing:
        text = f"{len(missing)} of {len(keys)} objects just written were not listed; gc and verify would miss them"
        return Finding(probe="list", verdict="failed", text=text)
    return Finding(probe="list", verdict="ok", text="what was written was listed at once")


def _delete(store: Store, prefix: str) -> Finding:
    key = f"{prefix}/delete"
    store.put(key, b"", mode="create")
    store.delete(key)
    store.delete(key)
    if exists(store, key):
        return Finding(probe="delete", verdict="failed", text="an object that was deleted was still there")
    return Finding(probe="delete", verdict="ok", text="an object could be deleted")


def _clock(store: Store, prefix: str) -> Finding:
    key = f"{prefix}/clock"
    before = time.time()
    store.put(key, b"", mode="create")
    after, theirs = time.time(), store.head(key).modified.timestamp()
    # Some stores keep whole seconds only.
    ahead = min(theirs + 1 - before, 0) + max(theirs - after, 0)
    if abs(ahead) > CLOCK_SECONDS:
        text = (
            f"the store's clock is {abs(ahead):.0f} s {'ahead of' if ahead > 0 else 'behind'} this machine's. Versions "
            "are in order all the same, but their times mislead: set the clock that is wrong."
        )
        return Finding(probe="clock", verdict="warning", text=text)
    return Finding(
        probe="clock", verdict="ok", text=f"the store's clock and this machine's differ by {abs(ahead):.1f} s"
    )


_PROBES: dict[str, Callable[[Store, str], Finding]] = {
    "write": _write,
    "read after write": _read_after_write,
    "create": _create,
    "create at once": _create_at_once,
    "overwrite": _overwrite,
    "list": _list,
    "delete": _delete,
    "clock": _clock,
}


def _hard_links(folder: Path) -> Finding:
    first, second = (folder / f".doctor-{uuid.uuid4().hex}" for _ in range(2))
    try:
        folder.mkdir(parents=True, exist_ok=True)
        first.touch()
        os.link(first, second)
    except OSError as error:
        text = str(explain(error, folder, verb="make a hard link in"))
        return Finding(probe="hard links", verdict="failed", text=f"{text} {_UNFIT}")
    finally:
        for path in (first, second):
            with contextlib.suppress(OSError):
                path.unlink()
    return Finding(probe="hard links", verdict="ok", text="there are hard links, by which an object is created")


def _free_space(folder: Path) -> Finding:
    there = next(path for path in (folder, *folder.parents) if os.path.exists(path))
    try:
        free = shutil.disk_usage(there).free
    except OSError as error:
        return Finding(probe="free space", verdict="warning", text=str(explain(error, there, verb="measure")))
    text = f"{free / 2**30:.1f} GiB are free"
    if free < LEAST_FREE:
        return Finding(probe="free space", verdict="warning", text=f"{text}. Make room before the next publish.")
    return Finding(probe="free space", verdict="ok", text=text)


def _leftovers(folder: Path) -> Finding:
    now, ages, size = time.time(), [], 0
    for path in folder.rglob(".tmp-*"):
        with contextlib.suppress(OSError):  # its writer has ended
            about = path.stat()
            ages.append(now - about.st_mtime)
            size += about.st_size
    old = [age for age in ages if age > OLD.total_seconds()]
    if not old:
        return Finding(probe="leftovers", verdict="ok", text="no temporary files of writers that were killed")
    text = (
        f"{len(old)} temporary files of writers that were most likely killed, the oldest {max(old) / 86400:.1f} days "
        f"old ({size} bytes with those of writers at work)"
    )
    return Finding(probe="leftovers", verdict="warning", text=text)
