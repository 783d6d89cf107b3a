"""The check of a location for a registry with many writers, by trials with temporary objects."""

import contextlib
import os
import shutil
import time
import uuid
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path

from finetune.core.system_errors import explain
from finetune.errors import FinetuneError
from finetune.registry.registry import AdapterRegistry
from finetune.registry.storage.local import LocalStore
from finetune.registry.storage.store import Store, exists
from finetune.registry.storage.trial import UNFIT, Finding, create, create_at_once, read_small, trial

CLOCK_SECONDS = 60  # a larger difference between the clocks is a warning
LEAST_FREE = 1 << 30  # bytes
OLD = timedelta(hours=1)  # an older temporary file was most likely left by a killed writer


def diagnose(registry: AdapterRegistry) -> list[Finding]:
    """Try out the store of a registry, which need not exist yet, and leave it unchanged.

    The first trial that raises an error is the last one.

    Returns:
        A finding for each trial. Do not write there when one is ``failed``.
    """
    store, findings = registry.store, []
    folder = store.root if isinstance(store, LocalStore) else None
    with trial(store, folder) as prefix:
        for probe, try_out in _PROBES.items():
            try:
                findings.append(try_out(store, prefix))
            except FinetuneError as error:
                findings.append(Finding(probe=probe, verdict="failed", text=str(error)))
                break
        if folder is not None:
            findings += [_hard_links(folder), _free_space(folder), _leftovers(folder)]
    return findings


def _write(store: Store, prefix: str) -> Finding:
    store.put(f"{prefix}/write", b"one", mode="create")
    return Finding(probe="write", verdict="ok", text="an object could be created")


def _read_after_write(store: Store, prefix: str) -> Finding:
    probe, key = "read after write", f"{prefix}/read"
    for number in range(5):
        data = b"%d" % number
        store.put(f"{key}-{number}", data, mode="create")
        if read_small(store, f"{key}-{number}") != data or store.head(f"{key}-{number}").size != len(data):
            return Finding(
                probe=probe, verdict="failed", text=f"a new object was read with other bytes than were written. {UNFIT}"
            )
    return Finding(probe=probe, verdict="ok", text="each new object could be read at once")


def _overwrite(store: Store, prefix: str) -> Finding:
    key = f"{prefix}/overwrite"
    for data in (b"one", b"another"):
        store.put(key, data, mode="overwrite")
    if (found := read_small(store, key)) != b"another":
        return Finding(probe="overwrite", verdict="failed", text=f"an object that was overwritten still held {found!r}")
    return Finding(probe="overwrite", verdict="ok", text="an object could be replaced")


def _list(store: Store, prefix: str) -> Finding:
    keys = {f"{prefix}/list/{number}" for number in range(3)}
    for key in keys:
        store.put(key, b"", mode="create")
    missing = keys - {meta.key for meta in store.list(f"{prefix}/list")}
    if missing:
        text = f"{len(missing)} of {len(keys)} new objects were not listed, so gc and verify would miss them"
        return Finding(probe="list", verdict="failed", text=text)
    return Finding(probe="list", verdict="ok", text="each new object was listed at once")


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
            f"the store's clock is {abs(ahead):.0f} s {'ahead of' if ahead > 0 else 'behind'} this machine's. The "
            "order of versions is right, but their times are not. Set the wrong clock right."
        )
        return Finding(probe="clock", verdict="warning", text=text)
    return Finding(
        probe="clock", verdict="ok", text=f"the store's clock and this machine's differ by {abs(ahead):.1f} s"
    )


_PROBES: dict[str, Callable[[Store, str], Finding]] = {
    "write": _write,
    "read after write": _read_after_write,
    "create": create,
    "create at once": create_at_once,
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
        return Finding(probe="hard links", verdict="failed", text=f"{text} {UNFIT}")
    finally:
        for path in (first, second):
            with contextlib.suppress(OSError):
                path.unlink()
    return Finding(
        probe="hard links", verdict="ok", text="the file system has hard links, which the creation of an object needs"
    )


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
