"""The changes of a log: each reads the newest entry, and adds one with the new state.

Another writer may add an entry first at any time. Then the same change is made again on top of that entry.
"""

import re
import uuid
from collections.abc import Callable, Iterable
from typing import Any

from finetune.adapters.reference import LATEST, AdapterRef, check_alias
from finetune.errors import AdapterReferenceError, ConflictError, YankedError
from finetune.registry.log.commits import Commit, Gate
from finetune.registry.log.log import Log
from finetune.registry.log.versions import Version

NO_REASON = "no reason was given"


_SEQ_DIGITS = 12  # hexadecimal, at the beginning of a txn


def new_txn(log: Log) -> str:
    """Return a new txn that begins with the present length of the log, so that only later entries are searched."""
    head = log.head()
    return f"{0 if head is None else head.seq:0{_SEQ_DIGITS}x}{uuid.uuid4().hex[_SEQ_DIGITS:]}"


def _made_at(txn: str, head: Commit) -> int:
    """Return the number of an entry up to which ``txn`` is not in the log."""
    # The digits of a random txn are a number far beyond the length of any log; then the whole log is searched.
    digits = txn[:_SEQ_DIGITS]
    seq = int(digits, 16) if re.fullmatch("[0-9a-f]{12}", digits) else 0
    return seq if seq <= head.seq else 0


def publish(log: Log, digest: str, summary: dict[str, Any], aliases: Iterable[str], *, txn: str | None) -> Commit:
    """Add the next version, once for each ``txn``; return the entry that published it.

    Raises:
        ConflictError: an entry for another change has ``txn`` already.
    """
    mine = uuid.uuid4().hex if txn is None else txn
    searched = 0

    def make(head: Commit | None) -> Commit:
        nonlocal searched
        if head is not None and txn is not None:
            done = log.find_txn(mine, head, above=max(searched, _made_at(mine, head)))
            searched = head.seq
            if done is not None:
                return done
        version = 1 if head is None else head.version + 1
        kept = {} if head is None else head.aliases
        moved = kept | dict.fromkeys(aliases, version)
        return Commit.after(
            head, op="publish", txn=mine, version=version, manifest=digest, aliases=moved, summary=summary
        )

    commit = log.append(make)
    if (commit.op, commit.manifest) != ("publish", digest):
        raise ConflictError(
            f"{log.namespace}/{log.name}: `txn` must be new for a new publish, but entry {commit.seq} ({commit.op}) "
            f"has {mine} already. Use a new `txn`."
        )
    return commit


def move(
    log: Log,
    ref: AdapterRef,
    alias: str,
    target: Callable[[Commit], int],
    *,
    op: str,
    expect: int | None,
    gate: Gate | None = None,
) -> Version:
    """Move an alias to a version; when it points there already, nothing is written.

    Args:
        log: the log of an adapter that exists.
        ref: that adapter.
        alias: the alias.
        target: the function that returns the version, given the newest entry.
        op: ``alias`` or ``rollback``.
        expect: the version that the alias must point to now, 0 for no such alias; None for any.
        gate: the conditions on the version, for the entry; None for none.

    Raises:
        AdapterReferenceError: ``alias`` is not an alias, or is ``latest``.
        ConflictError: the alias does not point to the expected version.
        YankedError: the target is yanked.
    """
    if check_alias(alias) == LATEST:
        raise AdapterReferenceError(
            f"`alias` must not be {LATEST!r}, which always points to the newest version that is not yanked. Choose "
            "another alias."
        )
    txn = uuid.uuid4().hex

    def make(head: Commit | None) -> Commit:
        assert head is not None, "entries of a log are never deleted"
        now = head.aliases.get(alias, 0)
        if expect is not None and now != expect:
            raise ConflictError(
                f"{ref.full_name}: the alias {alias!r} must point to {_show(expect)} (`expect`), but points to "
                f"{_show(now)} (entry {head.seq}, by {head.actor}). Nothing was changed. Look at `finetune registry "
                f"log {ref.full_name}`, then try again."
            )
        version = target(head)
        if (reason := head.yanked.get(str(version))) is not None:
            raise YankedError(
                f"{ref.full_name}@{version} is yanked: {reason}. Choose another version for {alias!r}; nothing was "
                "changed."
            )
        if now == version:
            return head
        expected = {} if expect is None else {alias: expect}
        return Commit.after(head, op=op, txn=txn, aliases=head.aliases | {alias: version}, expect=expected, gate=gate)

    commit = log.append(make)
    return Version.of(ref, log.find_version(commit.aliases[alias], commit), commit)


def yank(log: Log, ref: AdapterRef, version: int, *, reason: str | None) -> Version:
    """Mark a version as yanked; a new reason replaces the reason of an earlier yank."""
    number = str(version)
    return _mark(log, ref, version, "yank", lambda yanked: {number: NO_REASON, **yanked, **_given(number, reason)})


def unyank(log: Log, ref: AdapterRef, version: int) -> Version:
    """Remove the mark of a yanked version; a version without one stays as it is."""
    return _mark(log, ref, version, "unyank", lambda yanked: {n: why for n, why in yanked.items() if n != str(version)})


def _given(number: str, reason: str | None) -> dict[str, str]:
    return {} if reason is None else {number: reason}


def _mark(
    log: Log, ref: AdapterRef, version: int, op: str, change: Callable[[dict[str, str]], dict[str, str]]
) -> Version:
    txn = uuid.uuid4().hex

    def make(head: Commit | None) -> Commit:
        assert head is not None, "entries of a log are never deleted"
        yanked = change(head.yanked)
        return head if yanked == head.yanked else Commit.after(head, op=op, txn=txn, yanked=yanked)

    commit = log.append(make)
    return Version.of(ref, log.find_version(version, commit), commit)


def _show(version: int) -> str:
    return f"version {version}" if version else "no version"
