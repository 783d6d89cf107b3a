"""The log of one adapter: entries numbered from 1 without gaps, each created once and never changed.

Creating entry n+1 is the only moment at which anything becomes true. It fails when someone else was first, so
two writers can never both believe that they succeeded.
"""

import random
import time
from collections.abc import Callable, Iterator

from finetune.errors import ConflictError, IntegrityError, StoreError
from finetune.registry.commits import MAX_COMMIT_BYTES, Commit, log_key, split_log_key
from finetune.registry.store import AlreadyExists, ObjectMissing, Store, exists, read_all

MAX_ATTEMPTS = 100
FIRST_PAUSE = 0.002  # seconds; doubled at each lost race
LONGEST_PAUSE = 0.5  # seconds


class Log:
    """The entries of one adapter.

    Attributes:
        known: an entry that was seen to exist, from which the search for the newest starts; 0 for none.
    """

    def __init__(self, store: Store, namespace: str, name: str) -> None:
        self.store = store
        self.namespace = namespace
        self.name = name
        self.known = 0

    def key(self, seq: int) -> str:
        """Returns the key of an entry."""
        return log_key(self.namespace, self.name, seq)

    def read(self, seq: int) -> Commit:
        """Returns an entry.

        Raises:
            ObjectMissing: it does not exist.
            IntegrityError: it is damaged.
        """
        key = self.key(seq)
        commit = Commit.parse(read_all(self.store, key, max_bytes=MAX_COMMIT_BYTES), source=key)
        if commit.seq != seq:
            raise IntegrityError(f"{key}: it says that it is entry {commit.seq}")
        return commit

    def head(self) -> Commit | None:
        """Returns the newest entry, or None when there is none.

        Raises:
            IntegrityError: an entry that this process has seen is gone.
        """
        seq = self._last_seq()
        if seq == 0:
            return None
        try:
            commit = self.read(seq)
        except ObjectMissing:
            raise IntegrityError(
                f"{self.key(seq)}: it was there before and is gone; entries of a log are never deleted"
            ) from None
        self.known = seq
        return commit

    def _last_seq(self) -> int:
        # Entries have no gaps, so "exists" is true up to the newest and false after it.
        there, step = self.known, 1
        while exists(self.store, self.key(there + step)):
            there, step = there + step, step * 2
        missing = there + step
        while missing - there > 1:
            middle = (there + missing) // 2
            if exists(self.store, self.key(middle)):
                there = middle
            else:
                missing = middle
        return there

    def append(self, make: Callable[[Commit | None], Commit]) -> Commit:
        """Adds the entry that ``make`` builds upon the newest one.

        Args:
            make: gets the newest entry and returns the one to follow it, or an entry that is in the log
                already when there is nothing to write; raises ConflictError when its expectations do not
                hold. It is called again, upon a newer entry, whenever someone else was first; what it builds
                always has the same ``txn``.

        Returns:
            The entry as it stands in the log.

        Raises:
            ConflictError: others were first too many times.
            StoreError: the store refused twice; unless it says more, the entry may be in the log.
        """
        for attempt in range(MAX_ATTEMPTS):
            head = self.head()
            commit = make(head)
            if head is not None and commit.seq <= head.seq:
                return commit
            entry = self._create(commit)
            self.known = entry.seq
            if entry.txn == commit.txn:
                return entry
            time.sleep(random.uniform(0, min(LONGEST_PAUSE, FIRST_PAUSE * 2**attempt)))
        raise ConflictError(
            f"{self.namespace}/{self.name}: {MAX_ATTEMPTS} times someone else wrote first; try again later"
        )

    def _create(self, commit: Commit) -> Commit:
        """Returns the entry that now has the place of ``commit``: itself, or that of who was first."""
        key, raw = self.key(commit.seq), commit.to_bytes()
        try:
            self.store.put(key, raw, mode="create")
        except AlreadyExists:
            # Ours all the same when the store wrote it, lost the answer, and asked itself again.
            return self.read(commit.seq)
        except StoreError as error:
            # It may have failed after it had written. Asked again it says so, and that the entry is lasting.
            try:
                self.store.put(key, raw, mode="create")
            except AlreadyExists:
                return self.read(commit.seq)
            except StoreError:
                raise error from None
        return commit

    def find_version(self, version: int, head: Commit) -> Commit:
        """Returns the entry that published ``version``, which is at most ``head.version``.

        Raises:
            IntegrityError: the log does not hold it where it must be.
        """
        if head.op == "publish" and head.version == version:
            return head
        # No entry publishes more than one version, so version n is not before entry n; versions never fall.
        low, high = version, head.seq
        while low < high:
            middle = (low + high) // 2
            if self.read(middle).version >= version:
                high = middle
            else:
                low = middle + 1
        commit = self.read(low)
        if commit.version != version or commit.op != "publish":
            raise IntegrityError(f"{self.key(low)}: it should publish version {version}, and does not")
        return commit

    def find_digest(self, digest: str, head: Commit) -> Commit | None:
        """Returns the entry of the newest version with this manifest, or None; reads from ``head`` back."""
        back = self._back_from(head)
        return next((c for c in back if c.op == "publish" and c.manifest == digest), None)

    def find_txn(self, txn: str, head: Commit, *, above: int = 0) -> Commit | None:
        """Returns the entry with this ``txn`` after number ``above``, or None; reads from ``head`` back."""
        return next((c for c in self._back_from(head, down_to=above + 1) if c.txn == txn), None)

    def entries(self, head: Commit) -> Iterator[Commit]:
        """Yields every entry up to ``head``, the oldest first."""
        for seq in range(1, head.seq):
            yield self.read(seq)
        yield head

    def _back_from(self, head: Commit, down_to: int = 1) -> Iterator[Commit]:
        if head.seq >= down_to:
            yield head
        for seq in range(head.seq - 1, down_to - 1, -1):
            yield self.read(seq)


def list_logs(store: Store, namespace: str | None = None) -> dict[tuple[str, str], list[int]]:
    """Returns {(namespace, name): numbers of the entries that the store lists, ascending}."""
    found: dict[tuple[str, str], list[int]] = {}
    for meta in store.list("names" if namespace is None else f"names/{namespace}"):
        parts = split_log_key(meta.key)
        if parts is not None:
            found.setdefault(parts[:2], []).append(parts[2])
    return {name: sorted(entries) for name, entries in sorted(found.items())}
