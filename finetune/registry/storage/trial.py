"""Trials of a store with temporary objects: does it create an object once, for any number of writers?"""

import contextlib
import os
import uuid
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Literal

from finetune.errors import FinetuneError, StoreError
from finetune.registry.storage.store import AlreadyExists, Store, read_all

CREATORS = 8
MAX_BYTES = 1024  # of an object of a trial
ABANDONED = timedelta(days=1)  # trials that were killed
UNFIT = "Two writers could overwrite each other here without an error, so do not publish here."


@dataclass(frozen=True, kw_only=True)
class Finding:
    """The result of one trial.

    Attributes:
        probe: the name of the trial.
        verdict: ``failed`` if no process should write here, or some processes cannot.
        text: the observation, and what to do about it.
    """

    probe: str
    verdict: Literal["ok", "warning", "failed"]
    text: str


def check_create(store: Store) -> None:
    """Refuse a store that lets two writers create the same object, one after the other or at once.

    Raises:
        StoreError: the store lets them, or cannot be written.
    """
    with trial(store, None) as prefix:
        for try_out in (create, create_at_once):
            finding = try_out(store, prefix)
            if finding.verdict == "failed":
                raise StoreError(f"{finding.text} See `finetune registry doctor`.")


@contextlib.contextmanager
def trial(store: Store, folder: Path | None) -> Iterator[str]:
    """Yield a prefix for temporary objects; they are deleted at the end, like those that killed trials left."""
    prefix = f"doctor/{uuid.uuid4().hex}"
    new = [] if folder is None else [path for path in (folder, *folder.parents) if not os.path.exists(path)]
    try:
        yield prefix
    finally:
        # A failing list or delete has been reported by a trial before.
        with contextlib.suppress(FinetuneError):
            found = list(store.list("doctor"))
            now = max((meta.modified for meta in found), default=datetime.now(UTC))
            for meta in found:
                if meta.key.startswith(prefix) or now - meta.modified > ABANDONED:
                    store.delete(meta.key)
        if folder is not None:
            below = sorted((folder / "doctor").rglob("*"), reverse=True)  # a folder after what it holds
            for path in (*below, folder / "doctor", *new):
                with contextlib.suppress(OSError):  # not empty, a file, or missing
                    path.rmdir()


def creates(store: Store, key: str, data: bytes) -> bool:
    """Create an object, and return whether the store holds these bytes for it."""
    try:
        store.put(key, data, mode="create")
    except AlreadyExists:
        # It may still be ours, when the store wrote it, lost the answer and tried again by itself.
        return read_small(store, key) == data
    return True


def read_small(store: Store, key: str) -> bytes:
    """Return the bytes of an object of a trial."""
    return read_all(store, key, max_bytes=MAX_BYTES)


def create(store: Store, prefix: str) -> Finding:
    """Check that a second create of one object is refused."""
    probe, key = "create", f"{prefix}/create"
    for data in (b"first", b"second"):
        if creates(store, key, data) != (data == b"first"):
            text = "a second create was not refused" if data == b"second" else "a create of a new object was refused"
            return Finding(probe=probe, verdict="failed", text=f"{text}. {UNFIT}")
    return Finding(probe=probe, verdict="ok", text="a second create was refused")


def create_at_once(store: Store, prefix: str) -> Finding:
    """Check that exactly one of several creates of one object at once succeeds."""
    probe, key = "create at once", f"{prefix}/at-once"
    with ThreadPoolExecutor(CREATORS) as pool:
        creators = [b"creator %d" % number for number in range(CREATORS)]
        won = [*pool.map(lambda data: creates(store, key, data), creators)]
    if sum(won) != 1:
        text = f"of {CREATORS} creates of one object at once exactly one must succeed, but {sum(won)} did. {UNFIT}"
        return Finding(probe=probe, verdict="failed", text=text)
    if (found := read_small(store, key)) != creators[won.index(True)]:
        text = f"a create that was refused wrote {found!r} over the one that succeeded. {UNFIT}"
        return Finding(probe=probe, verdict="failed", text=text)
    return Finding(probe=probe, verdict="ok", text=f"of {CREATORS} creates of one object at once one succeeded")
