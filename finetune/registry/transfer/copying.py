"""Copying an adapter with its whole history from one registry to another.

The entries of a log are copied byte for byte, so the chain of their digests stays whole. The version numbers, aliases
and digests are the same on both sides. The blobs that entries name are copied first. So at any moment the copy is a
shorter history of the same adapter, and an interrupted copy continues where it stopped.
"""

import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import partial

from finetune.adapters.manifest import FileEntry
from finetune.adapters.reference import AdapterRef
from finetune.errors import (
    AdapterReferenceError,
    ConflictError,
    FinetuneError,
    IntegrityError,
    NotFoundError,
    StoreError,
)
from finetune.lookup import did_you_mean
from finetune.registry.log.commits import Commit, log_key
from finetune.registry.log.links import check_link
from finetune.registry.log.log import Log, list_logs
from finetune.registry.storage.adapter_folders import load_manifest
from finetune.registry.storage.blobs import LONGEST, blob_key, put_blobs, read_blob
from finetune.registry.storage.location import is_registry
from finetune.registry.storage.store import AlreadyExists, ObjectMissing, Store, exists

MAX_COPYING = LONGEST.total_seconds() / 2  # seconds for all blobs of an adapter; a slower copy checks them again


@dataclass(frozen=True, kw_only=True)
class Copied:
    """The result of a copy of one adapter.

    Attributes:
        name: the adapter, ``ns/name``.
        entries: the number of log entries that were copied; 0 when the target had them all.
        versions: the number of versions that these entries publish.
        blobs: the number of files and manifests that these entries name.
        bytes: the number of bytes in these files and manifests.
    """

    name: str
    entries: int
    versions: int
    blobs: int
    bytes: int


def names_in(store: Store) -> list[str]:
    """Return the names of all adapters that a store lists, sorted."""
    return ["/".join(parts) for parts in list_logs(store)]


def copy_adapter(source: Store, target: Store, name: str) -> Copied:
    """Copy an adapter with its history; every byte is checked on the way.

    Existing entries of the target stay unchanged. When the target has more entries, nothing is written.

    Args:
        source: the store of the registry to copy from.
        target: the store of the registry to copy to; it becomes a registry if it is not one.
        name: the adapter, ``ns/name``.

    Raises:
        ConflictError: the target has another history under that name; the message names the first different entry,
            and nothing was written. Or another writer wrote to it meanwhile, or its gc deletes blobs of the copy.
        NotFoundError: the source has no such adapter.
        IntegrityError: the source, or the copy in the target, is damaged.
        StoreError: one of the two cannot be read or written; try again.
    """
    ref = AdapterRef.parse_name(name)
    check_has(source, ref)
    there = _in_common(source, target, ref)
    missing = list(read_history(source, ref, after=there))
    needed = {entry.sha256: entry for commit in missing for entry in blobs_of(source, ref, commit)}
    if missing:
        is_registry(target, create=True)
    _copy_blobs(source, target, list(needed.values()))
    for commit in missing:
        _copy_entry(target, ref, commit)
    if not all(exists(target, blob_key(digest)) for digest in needed):  # gc ran while this machine slept
        _copy_blobs(source, target, list(needed.values()))
    return Copied(
        name=name,
        entries=len(missing),
        versions=sum(commit.op == "publish" for commit in missing),
        blobs=len(needed),
        bytes=sum(entry.size for entry in needed.values()),
    )


def check_has(store: Store, ref: AdapterRef) -> None:
    """Refuse an adapter that a store does not hold.

    Raises:
        NotFoundError: the adapter does not exist; the message names the existing ones.
    """
    if not exists(store, log_key(ref.namespace, ref.name, 1)):
        names = names_in(store)
        raise NotFoundError(
            f"no adapter {ref.full_name!r} to copy.{did_you_mean(ref.full_name, names)} "
            f"Adapters there: {', '.join(names[:20]) or 'none yet'}."
        )


def copy_adapters(source: Store, target: Store, names: Iterable[str]) -> tuple[list[Copied], list[FinetuneError]]:
    """Copy several adapters; go on after one that is damaged, or has another history in the target.

    Returns:
        The copies, and the errors of those that were not copied.

    Raises:
        AdapterReferenceError: a name is not ``ns/name``.
        NotFoundError: the source has no such adapter.
        StoreError: one of the two cannot be read or written; try again.
    """
    copied: list[Copied] = []
    refused: list[FinetuneError] = []
    for name in names:
        try:
            copied.append(copy_adapter(source, target, name))
        except ConflictError as error:
            refused.append(error)
        except (AdapterReferenceError, NotFoundError):
            raise
        except FinetuneError as error:
            if isinstance(error, StoreError) and not isinstance(error, ObjectMissing):
                raise
            refused.append(IntegrityError(f"cannot copy {name}: {error}"))
    return copied, refused


def read_history(store: Store, ref: AdapterRef, *, after: int = 0) -> Iterator[Commit]:
    """Yield the entries of an adapter's log after number ``after``, and check the chain between them.

    Raises:
        IntegrityError: an entry is damaged, or does not follow from the one before it.
    """
    log = Log(store, ref.namespace, ref.name)
    head = log.head()
    previous = log.read(after) if after else None
    for seq in range(after + 1, head.seq + 1 if head else 0):
        commit = log.read(seq)
        for problem in check_link(commit, previous):
            raise IntegrityError(f"{log.key(seq)}: {problem}. Look for more damage with `finetune registry verify`.")
        yield commit
        previous = commit


def blobs_of(store: Store, ref: AdapterRef, commit: Commit) -> list[FileEntry]:
    """Return the files that an entry publishes, the manifest last; an empty list when its op is not publish.

    Raises:
        IntegrityError: its manifest is damaged or missing, or its summary is not that of the entry.
    """
    if commit.op != "publish":
        return []
    key = blob_key(commit.manifest)
    try:
        raw, manifest = load_manifest(store, commit.manifest, ref.full_name)
    except ObjectMissing as error:
        raise IntegrityError(f"{key}, the manifest of {ref.full_name}@{commit.version}, is missing: {error}") from None
    if manifest.summary() != commit.current_summary:
        raise IntegrityError(
            f"{key}: its summary must be that in {log_key(ref.namespace, ref.name, commit.seq)}, and differs"
        )
    return [*manifest.files.values(), FileEntry(sha256=commit.manifest, size=len(raw))]


def _in_common(source: Store, target: Store, ref: AdapterRef) -> int:
    """Return the number of entries that both have; refuse to copy when both have other entries after them."""
    ours, theirs = (Log(store, ref.namespace, ref.name) for store in (source, target))
    head, reached = ours.head(), theirs.head()
    if head is None or reached is None:
        return 0
    common = min(head.seq, reached.seq)
    if theirs.read(common) == ours.read(common):
        return common
    # Each entry fixes all entries before it, so the logs are equal up to some entry and differ after it.
    low, high = 1, common
    while low < high:
        middle = (low + high) // 2
        if theirs.read(middle) == ours.read(middle):
            low = middle + 1
        else:
            high = middle
    raise _parted(ref, ours.read(low), theirs.read(low))


def _parted(ref: AdapterRef, commit: Commit, other: Commit) -> ConflictError:
    ours, theirs = [f"{entry.op} by {entry.actor} at {entry.time}" for entry in (commit, other)]
    return ConflictError(
        f"{ref.full_name}: source and target must have the same history, but differ from entry {commit.seq} on: in the "
        f"source {ours}, in the target {theirs}. Publish the versions that the target lacks as new ones there."
    )


def _copy_blobs(source: Store, target: Store, entries: list[FileEntry]) -> None:
    """Make sure that a target has whole blobs, and that its gc does not delete them before an entry names them."""
    for entry in entries:
        if _is_damaged(target, entry):  # all right bytes for a digest are the same
            target.put(blob_key(entry.sha256), _read(source, entry), mode="overwrite")
    took = MAX_COPYING
    while entries and took >= MAX_COPYING:  # the first blobs could be too old by now
        began = time.monotonic()
        put_blobs(target, [(entry, partial(_read, source, entry)) for entry in entries])
        took = time.monotonic() - began


def _is_damaged(store: Store, entry: FileEntry) -> bool:
    try:
        for _ in read_blob(store, entry):
            pass
    except ObjectMissing:
        return False
    except IntegrityError:
        return True
    return False


def _read(source: Store, entry: FileEntry) -> Iterator[bytes]:
    try:
        yield from read_blob(source, entry)
    except ObjectMissing as error:
        raise IntegrityError(f"{blob_key(entry.sha256)} is missing: {error}") from None


def _copy_entry(target: Store, ref: AdapterRef, commit: Commit) -> None:
    log = Log(target, ref.namespace, ref.name)
    try:
        target.put(log.key(commit.seq), commit.to_bytes(), mode="create")
    except AlreadyExists:
        # Ours, when the answer to an earlier try was lost, or from another copy of the same history.
        if (there := log.read(commit.seq)) != commit:
            raise _parted(ref, commit, there) from None
