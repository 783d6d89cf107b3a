"""Blobs: bytes under their own digest, checked when they are read, and stored so that gc does not delete them.

gc and publish may run at the same time, on different machines. ``garbage_collection.py`` has the protocol between them,
and the proof that gc never deletes a referenced blob.
"""

import hashlib
import random
import re
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from datetime import datetime, timedelta

from finetune.adapters.manifest import FileEntry, canonical_json, strict_json
from finetune.errors import ConflictError, IntegrityError, ManifestError
from finetune.registry.storage.store import ObjectMeta, ObjectMissing, Store, chunks, read_all, reading

BLOBS = "blobs/sha256"
PLANS = "gc/plans"
MAX_PLANNED = 10_000  # blobs of one plan
MAX_PLAN_BYTES = 1024 * 1024  # about 90 bytes per blob

FRESH = timedelta(days=1)  # a publish writes a blob again that is older than this by the store's clock
LONGEST = timedelta(days=1)  # from the first blob of a publish to its entry, and from a plan to its last deletion
LEAST_GRACE = FRESH + LONGEST
PLAN_LIFE = 2 * LONGEST  # an older plan was left by a killed gc

MAX_ATTEMPTS = 60  # to store blobs while gc is deleting them
LONGEST_PAUSE = 1.0  # seconds

_PLAN_KEY = re.compile(rf"{PLANS}/[0-9a-f]{{32}}\.json")
_BLOB_KEY = re.compile(rf"{BLOBS}/([0-9a-f]{{2}})/(\1[0-9a-f]{{62}})")

# Returns the bytes of a blob from the start at each call.
Content = Callable[[], bytes | Iterable[bytes]]


def blob_key(digest: str) -> str:
    """Return the key of the bytes with this SHA-256."""
    return f"{BLOBS}/{digest[:2]}/{digest}"


def digest_of(key: str) -> str | None:
    """Return the SHA-256 of the bytes under a key, or None when it is not the key of a blob."""
    match = _BLOB_KEY.fullmatch(key)
    return match[2] if match else None


def checked(pieces: Iterable[bytes], entry: FileEntry, *, what: str) -> Iterator[bytes]:
    """Pass bytes on; raise at their end, or once there are too many, when they are not those of ``entry``.

    Args:
        pieces: the bytes.
        entry: the size and digest that the bytes must have.
        what: the name of the file or blob, for messages.

    Raises:
        IntegrityError: the bytes are not those of ``entry``; the message begins with ``what``.
    """
    digest, seen = hashlib.sha256(), 0
    for piece in pieces:
        seen += len(piece)
        if seen > entry.size:
            raise IntegrityError(f"{what}: must have {entry.size} bytes, got more")
        digest.update(piece)
        yield piece
    if seen != entry.size:
        raise IntegrityError(f"{what}: must have {entry.size} bytes, got {seen}")
    if digest.hexdigest() != entry.sha256:
        raise IntegrityError(f"{what}: its sha256 is {digest.hexdigest()}, but must be {entry.sha256}")


def read_blob(store: Store, entry: FileEntry) -> Iterator[bytes]:
    """Yield the bytes of a blob, checked.

    Raises:
        ObjectMissing: the blob does not exist.
        IntegrityError: the blob is damaged.
    """
    key = blob_key(entry.sha256)
    with reading(store, key) as file:
        yield from checked(chunks(file), entry, what=key)


def put_blobs(store: Store, blobs: Sequence[tuple[FileEntry, Content]]) -> None:
    """Store blobs, so that an entry that names them may follow.

    When this returns all blobs exist, and gc deletes none of them until ``LONGEST`` after the call began. Write the
    entry that names them before then.

    Args:
        store: the store.
        blobs: the blobs to store. Existing blobs stay when they have the right size and are fresh. The last blob, which
            should be small, is always written, because its time shows the clock of the store.

    Raises:
        ConflictError: gc is deleting one of the blobs.
        IntegrityError: the plan of a gc cannot be read.
        StoreError: the store cannot be written.
    """
    written: set[str] = set()  # by this call, and so fresh
    keys = {blob_key(entry.sha256) for entry, _ in blobs}
    plan = None
    for attempt in range(MAX_ATTEMPTS):
        now = _written_now(store, *blobs[-1])
        for entry, content in blobs[:-1]:
            if entry.sha256 not in written and not (now and _is_there(store, entry, since=now - FRESH)):
                # Overwritten: a bucket creates an object in one piece only, and every writer writes the same bytes.
                store.put(blob_key(entry.sha256), content(), mode="overwrite")
                written.add(entry.sha256)
        plan = _plan_for(store, keys, now) if now else None
        if now and plan is None:
            # After the plans: by now, every blob that a finished gc deleted is missing.
            lost = {entry.sha256 for entry, _ in blobs if not _is_there(store, entry)}
            if not lost:
                return
            written -= lost
        time.sleep(random.uniform(0, min(LONGEST_PAUSE, 0.01 * 2**attempt)))
    if plan is None:
        raise ConflictError(
            f"cannot store {', '.join(sorted(keys))}: one of them disappears after each write. Check whether another "
            "program deletes files of the registry, then try again."
        )
    raise ConflictError(
        f"cannot store {', '.join(sorted(keys))}: a gc is deleting the blobs in {plan.key}. Try again when it has "
        f"ended, at the latest after {plan.modified + PLAN_LIFE:%Y-%m-%d %H:%M} UTC. If no gc runs, delete that file."
    )


def plan_key(name: str) -> str:
    """Return the key of the plan of one gc, given its name of 32 lower-case hexadecimal digits."""
    return f"{PLANS}/{name}.json"


def plan_bytes(keys: Iterable[str]) -> bytes:
    """Return the contents of a plan: the keys of the blobs that a gc may delete while the plan exists."""
    return canonical_json({"blobs": sorted(keys)})


def _plan_for(store: Store, keys: set[str], now: datetime) -> ObjectMeta | None:
    """Return a plan to delete one of these blobs, whose gc may still be running, or None.

    Raises:
        IntegrityError: a plan cannot be read.
    """
    for found in store.list(PLANS):
        # A publish begins at ``now`` and takes less than LONGEST, so it meets no plan with a later time than that.
        if not _PLAN_KEY.fullmatch(found.key) or not -PLAN_LIFE <= found.modified - now <= LONGEST:
            continue
        try:
            planned = _planned(read_all(store, found.key, max_bytes=MAX_PLAN_BYTES), source=found.key)
        except ObjectMissing:  # that gc has ended
            continue
        except (IntegrityError, ManifestError) as error:
            raise IntegrityError(
                f"{error}. Without this plan it is not known which blobs a gc deletes, so nothing was published. If no "
                "gc runs, delete that file of the registry and publish again."
            ) from None
        if planned & keys:
            return found
    return None


def _planned(raw: bytes, *, source: str) -> set[str]:
    plan = strict_json(raw, source=source, max_bytes=MAX_PLAN_BYTES)
    blobs = plan["blobs"] if isinstance(plan, dict) and plan.keys() == {"blobs"} else None
    if not isinstance(blobs, list) or not all(isinstance(key, str) and digest_of(key) for key in blobs):
        raise IntegrityError(
            f'{source}: a plan of gc must be {{"blobs": [KEY, ...]}} with the keys of blobs, got something else'
        )
    return set(blobs)


def _written_now(store: Store, entry: FileEntry, content: Content) -> datetime | None:
    """Write a blob and return its time by the store's clock; None when it was deleted meanwhile."""
    store.put(blob_key(entry.sha256), content(), mode="overwrite")
    try:
        return store.head(blob_key(entry.sha256)).modified
    except ObjectMissing:
        return None


def _is_there(store: Store, entry: FileEntry, *, since: datetime | None = None) -> bool:
    """Return whether a blob exists with its size, and was written since a time, but not in the future."""
    try:
        found = store.head(blob_key(entry.sha256))
    except ObjectMissing:
        return False
    return found.size == entry.size and (since is None or since <= found.modified <= since + 2 * FRESH)
