"""Garbage collection: it deletes the objects of a registry that no log names, while others publish.

A publish stores its blobs first and names them last, in the entry of a log. The blobs of a publish that was killed
before that are garbage. They look like those of a publish that is still running. All times below are by the store's
clock; no two machines' clocks are compared.

::

    publish (blobs.put_blobs, then the log)         gc
      P1  writes its manifest: now is the time        G1  reads the time
          of that                                     G2  lists blobs, reads all logs: what is older than
      P2  writes its other blobs, but those that          the grace period at G1, and unnamed, is garbage
          lie there no older than FRESH at P1         G3  writes a plan that names it
      P3  lists the plans: none names its blobs       G4  reads the new entries of all logs
      P4  checks that each blob exists                G5  checks each blob again: if it is still that
      P5  writes the entry that names them                old, and unnamed, deletes it
                                                      G6  deletes the plan

A publish that finds a plan at P3 waits, and one that misses a blob at P4 writes it again; then it continues from P1. A
plan that it cannot read may name any blob, and ends the publish with an error that names the file.
The proof assumes that a publish takes less than LONGEST from its start to P5. gc starts no deletion after LONGEST is
over since G3.

Nothing that an entry names is deleted. Let X be named by P5 and deleted at G5.

- Deleted before P4: then P4 missed it. So it is deleted after P4, hence after P3.
- G3 before P3: the plan is deleted after X, so it existed at P3. Then P3 saw it and the publish waited; or
  it was older than PLAN_LIFE, and its gc no longer deletes.
- G3 after P3: before P3, X was there and no older than FRESH when the publish began; any later write made
  it younger. G5 comes after G3, and found X older than the grace period was at G1. So G1 was
  at least the grace period less FRESH, which is LONGEST or more, after the publish began, and so after P5. Then
  G2 read its entry, and X was named.

The proof holds while the store's clock runs without a jump; G4 is for a clock that was set. A publish checks its blobs
once more after P5, so a publish that returns is complete even if it slept for longer than LONGEST. Two gcs disturb each
other as little as they disturb a publish: each deletes only what is garbage for the other too.
"""

import re
import time
import uuid
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta

from finetune.errors import IntegrityError, NotFoundError, RegistryError
from finetune.registry.log.log import Log, list_logs
from finetune.registry.registry import AdapterRegistry
from finetune.registry.storage.adapter_folders import load_manifest
from finetune.registry.storage.blobs import (
    BLOBS,
    LEAST_GRACE,
    LONGEST,
    MAX_PLANNED,
    digest_of,
    plan_bytes,
    plan_key,
)
from finetune.registry.storage.location import is_registry
from finetune.registry.storage.store import KeepsAside, ObjectMeta, ObjectMissing, Store

DEFAULT_GRACE = timedelta(days=7)
# Plans and probes that a killed gc or doctor leaves. Nothing else in these folders is ours.
_SCRATCH = re.compile(r"gc/clock-[0-9a-f]{32}|gc/plans/[0-9a-f]{32}\.json|doctor/[0-9a-f]{32}/.+")


@dataclass(frozen=True, kw_only=True)
class Garbage:
    """One object that can be deleted, or a file that a killed writer left.

    Attributes:
        key: the key of the object.
        size: the size in bytes.
        modified: the time when it was written, by the store's clock.
        why: the reason why it is garbage.
    """

    key: str
    size: int
    modified: datetime
    why: str

    @classmethod
    def of(cls, found: ObjectMeta, why: str) -> "Garbage":
        """Return an object as garbage."""
        return cls(key=found.key, size=found.size, modified=found.modified, why=why)


@dataclass(frozen=True, kw_only=True)
class Collection:
    """The result of a garbage collection.

    Attributes:
        garbage: the objects that can be deleted.
        deleted: the deleted objects, without those that a publish began to use meanwhile. None in a dry run.
        young: the number of blobs that no log names either, but that are too young to be deleted.
    """

    garbage: list[Garbage]
    deleted: list[Garbage] | None
    young: int


def collect(registry: AdapterRegistry, *, grace: timedelta = DEFAULT_GRACE, delete: bool = False) -> Collection:
    """Find, and with ``delete`` remove, the objects that no log names and that are older than a grace period.

    These are blobs that no log names, temporary files of killed writers, and plans and probes of killed gcs and
    doctors. Others may publish meanwhile.

    Args:
        registry: the registry; a dry run writes to it too, to read its clock.
        grace: the age from which an object may be deleted, at least ``LEAST_GRACE``.
        delete: True to delete the garbage; False for a dry run.

    Raises:
        NotFoundError: there is no registry.
        RegistryError: the grace period is too short, or this program cannot read a log.
        IntegrityError: a log or a manifest is damaged, so the needed blobs are not known; nothing was deleted.
    """
    if grace < LEAST_GRACE:
        raise RegistryError(
            f"`grace` must be at least {_days(LEAST_GRACE)}, got {_days(grace)}. A publish relies on blobs that are "
            "younger than that."
        )
    store = registry.store
    if not is_registry(store):
        raise NotFoundError(f"there is no registry at {registry.location}. Check --registry or FINETUNE_REGISTRY.")
    before = store_time(store) - grace
    named = _Named(store)
    named.read_new_entries()
    blobs = [found for found in store.list(BLOBS) if named.lacks(found.key)]
    unnamed = [Garbage.of(found, "no log names it") for found in blobs if found.modified < before]
    scratch = [
        Garbage.of(found, f"left by a {folder} that was killed")
        for folder in ("gc", "doctor")
        for found in store.list(folder)
        if found.modified < before and _SCRATCH.fullmatch(found.key)
    ]
    aside = [
        Garbage.of(found, "left by a writer that was killed")
        for found in (store.list_aside() if isinstance(store, KeepsAside) else ())
        if found.modified < before
    ]
    garbage = [*unnamed, *scratch, *aside]
    young = len(blobs) - len(unnamed)
    if not delete:
        return Collection(garbage=garbage, deleted=None, young=young)
    deleted = []
    for start in range(0, len(unnamed), MAX_PLANNED):
        deleted += _delete_blobs(store, unnamed[start : start + MAX_PLANNED], named, before)
    for left in scratch:
        store.delete(left.key)
    if isinstance(store, KeepsAside):
        for left in aside:
            store.delete_aside(left.key)
    return Collection(garbage=garbage, deleted=[*deleted, *scratch, *aside], young=young)


def store_time(store: Store) -> datetime:
    """Return the time of the store's clock: that of an object written now.

    Raises:
        StoreError: the store cannot be written.
    """
    key = f"gc/clock-{uuid.uuid4().hex}"
    try:
        store.put(key, b"", mode="overwrite")
        return store.head(key).modified
    finally:
        store.delete(key)


class _Named:
    """The blobs that the logs name, as far as they were read. Entries never change, so each is read once."""

    def __init__(self, store: Store) -> None:
        self.store = store
        self.digests: set[str] = set()
        self.read: dict[tuple[str, str], int] = {}  # number of the last entry that was read

    def lacks(self, key: str) -> bool:
        """Return whether a key belongs to a blob that no entry names."""
        digest = digest_of(key)
        return digest is not None and digest not in self.digests

    def read_new_entries(self) -> None:
        """Add the blobs that new entries name.

        Raises:
            IntegrityError: an entry or manifest cannot be read; the message names it.
        """
        for (namespace, name), entries in list_logs(self.store).items():
            log, last = Log(self.store, namespace, name), self.read.get((namespace, name), 0)
            for seq in range(last + 1, entries[-1] + 1):
                self._read_entry(log, seq)
            self.read[namespace, name] = entries[-1]

    def _read_entry(self, log: Log, seq: int) -> None:
        try:
            commit = log.read(seq)
            if commit.op == "publish" and commit.manifest not in self.digests:
                _, manifest = load_manifest(self.store, commit.manifest, f"{log.namespace}/{log.name}")
                self.digests |= {commit.manifest, *(entry.sha256 for entry in manifest.files.values())}
        except (IntegrityError, ObjectMissing) as error:
            raise IntegrityError(
                f"the files of entry {seq} of {log.namespace}/{log.name} are not known, so nothing was deleted: "
                f"{error}. Look for more damage with `finetune registry verify`. To repair the files of a version, "
                "publish the same folder again."
            ) from None


def _delete_blobs(store: Store, unnamed: Sequence[Garbage], named: _Named, before: datetime) -> list[Garbage]:
    """Delete blobs by the steps G3 to G6; return the deleted ones."""
    began, deleted = time.time(), []
    plan = plan_key(uuid.uuid4().hex)
    try:
        store.put(plan, plan_bytes(blob.key for blob in unnamed), mode="overwrite")
        named.read_new_entries()
        for blob in unnamed:
            # The machine may have slept, or its clock may have been set.
            if abs(time.time() - began) > LONGEST.total_seconds():
                break
            if named.lacks(blob.key) and _is_older(store, blob.key, before):
                store.delete(blob.key)
                deleted.append(blob)
    finally:
        store.delete(plan)
    return deleted


def _is_older(store: Store, key: str, before: datetime) -> bool:
    try:
        return store.head(key).modified < before
    except ObjectMissing:
        return False


def _days(period: timedelta) -> str:
    return f"{period / timedelta(days=1):g} days"
