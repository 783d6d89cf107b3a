"""The log of one adapter: entries numbered from 1 without gaps, each created once and never changed.

A change takes effect when entry n+1 is created. The creation fails when another writer was first, so two writers
never create the same entry.
"""

import contextlib
import random
import time
from collections.abc import Callable, Iterator

from finetune.errors import ConflictError, IntegrityError, StoreError
from finetune.registry.log.commits import MAX_COMMIT_BYTES, Commit, log_key, split_log_key
from finetune.registry.log.guard import UNGUARDED, Guard
from finetune.registry.log.hint import HINT_EVERY, Place, around, read_hint, write_hint
from finetune.registry.log.search import find_newest, find_version
from finetune.registry.storage.store import AlreadyExists, ObjectMissing, Store, read_all

MAX_ATTEMPTS = 100
FIRST_PAUSE = 0.002  # seconds; doubled at each lost race
LONGEST_PAUSE = 0.5  # seconds


class Log:
    """The entries of one adapter.

    Attributes:
        guard: the guard that checks the entry on which a new one is built, and signs the new one.
        known: the number of an entry that was seen, from which the search for the newest starts; 0 for none.
    """

    def __init__(self, store: Store, namespace: str, name: str, guard: Guard = UNGUARDED) -> None:
        self.store = store
        self.namespace = namespace
        self.name = name
        self.guard = guard
        self.known = 0
        self._places: list[Place] = []  # of the hint, once it was read

    def key(self, seq: int) -> str:
        """Return the key of an entry."""
        return log_key(self.namespace, self.name, seq)

    def read(self, seq: int) -> Commit:
        """Return an entry.

        Raises:
            ObjectMissing: the entry does not exist.
            IntegrityError: the entry is damaged.
        """
        return self._parse(seq, read_all(self.store, self.key(seq), max_bytes=MAX_COMMIT_BYTES))

    def head(self) -> Commit | None:
        """Return the newest entry, or None when there is none.

        Raises:
            IntegrityError: an entry that this process has seen is gone.
        """
        seq, raw = find_newest(self._fetch, self._read_hint, self.known)
        if seq == 0:
            return None
        try:
            commit = self.read(seq) if raw is None else self._parse(seq, raw)
        except ObjectMissing:
            raise IntegrityError(
                f"{self.key(seq)}: this log entry must exist, because it was read before, and is gone. The registry "
                "never deletes an entry: look for more damage with `finetune registry verify`."
            ) from None
        self.known = seq
        return commit

    def _fetch(self, seq: int) -> bytes | None:
        try:
            return read_all(self.store, self.key(seq), max_bytes=MAX_COMMIT_BYTES)
        except ObjectMissing:
            return None

    def _parse(self, seq: int, raw: bytes) -> Commit:
        commit = Commit.parse(raw, source=self.key(seq))
        if commit.seq != seq:
            raise IntegrityError(f"{self.key(seq)}: its `seq` must be {seq}, got {commit.seq}")
        return commit

    def _read_hint(self) -> int:
        self._places = read_hint(self.store, self.namespace, self.name)
        return self._places[-1][0] if self._places else 0

    def append(self, make: Callable[[Commit | None], Commit]) -> Commit:
        """Add the entry that ``make`` builds upon the newest one.

        Args:
            make: the function that gets the newest entry and returns the next one, or an entry that is in the log
                already when there is nothing to write. It raises ConflictError when its expectations do not hold. It
                is called again with a newer entry when another writer was first; each entry that it builds has the
                same ``txn``.

        Returns:
            The entry in the log.

        Raises:
            ConflictError: other writers were first too many times.
            TrustError: the guard does not accept the newest entry, or cannot sign the new one.
            StoreError: the store refused twice; the entry may be in the log, unless the message excludes it.
        """
        for attempt in range(MAX_ATTEMPTS):
            head = self.head()
            # The new entry repeats the state of the newest one, and its signature covers that state.
            self.guard.check_head(self, head)
            commit = make(head)
            if head is not None and commit.seq <= head.seq:
                return commit
            entry = self._create(self.guard.seal(self, commit))
            self.known = entry.seq
            if entry.txn == commit.txn:
                if entry.seq % HINT_EVERY == 0:
                    with contextlib.suppress(StoreError):
                        write_hint(self.store, self.namespace, self.name, entry)
                self.guard.remember(self, entry)
                return entry
            time.sleep(random.uniform(0, min(LONGEST_PAUSE, FIRST_PAUSE * 2**attempt)))
        raise ConflictError(
            f"cannot write to the log of {self.namespace}/{self.name}: other writers were first {MAX_ATTEMPTS} times. "
            "Try again later."
        )

    def _create(self, commit: Commit) -> Commit:
        """Return the entry that now has the number of ``commit``: itself, or that of a writer who was first."""
        key, raw = self.key(commit.seq), commit.to_bytes()
        try:
            self.store.put(key, raw, mode="create")
        except AlreadyExists:
            # It may still be ours, when the store wrote it, lost the answer and tried again by itself.
            return self.read(commit.seq)
        except StoreError as error:
            # The store may have failed after the write. A second create reveals that, and that the entry is lasting.
            try:
                self.store.put(key, raw, mode="create")
            except AlreadyExists:
                return self.read(commit.seq)
            except StoreError:
                raise error from None
        return commit

    def find_version(self, version: int, head: Commit) -> Commit:
        """Return the entry that published ``version``, which is at most ``head.version``.

        Raises:
            IntegrityError: the log lacks that entry.
        """
        if head.op == "publish" and head.version == version:
            return head
        # First with the places of the hint, then without, because the hint may be wrong.
        for places in (self._places, []):
            commit, seq = find_version(self.read, version, *around(places, version, head))
            if commit is not None:
                return commit
        raise IntegrityError(
            f"{self.key(seq)}: this entry or an earlier one must publish version {version}, and none does. Look for "
            "more damage with `finetune registry verify`."
        )

    def find_digest(self, digest: str, head: Commit) -> Commit | None:
        """Return the entry of the newest version with this manifest, or None; read from ``head`` back."""
        back = self._back_from(head)
        return next((c for c in back if c.op == "publish" and c.manifest == digest), None)

    def find_txn(self, txn: str, head: Commit, *, above: int = 0) -> Commit | None:
        """Return the entry with this ``txn`` after number ``above``, or None; read from ``head`` back."""
        return next((c for c in self._back_from(head, down_to=above + 1) if c.txn == txn), None)

    def entries(self, head: Commit) -> Iterator[Commit]:
        """Yield every entry up to ``head``, the oldest first, each checked by the digest in the next one.

        Raises:
            IntegrityError: an entry does not follow the one before it.
        """
        previous: Commit | None = None
        for seq in range(1, head.seq + 1):
            entry = head if seq == head.seq else self.read(seq)
            if entry.prev != (None if previous is None else previous.digest):
                raise IntegrityError(
                    f"{self.key(seq)}: its `prev` must be the digest of the entry before it, and is not, so one of the "
                    "two was changed. Look for more damage with `finetune registry verify`."
                )
            yield (previous := entry)

    def _back_from(self, head: Commit, down_to: int = 1) -> Iterator[Commit]:
        if head.seq >= down_to:
            yield head
        for seq in range(head.seq - 1, down_to - 1, -1):
            yield self.read(seq)


def list_logs(store: Store, namespace: str | None = None) -> dict[tuple[str, str], list[int]]:
    """Return {(namespace, name): numbers of the entries that the store lists, ascending}."""
    found: dict[tuple[str, str], list[int]] = {}
    for meta in store.list("names" if namespace is None else f"names/{namespace}"):
        parts = split_log_key(meta.key)
        if parts is not None:
            found.setdefault(parts[:2], []).append(parts[2])
    return {name: sorted(entries) for name, entries in sorted(found.items())}
