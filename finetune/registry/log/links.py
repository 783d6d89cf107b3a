"""The checks that an entry of a log follows the one before it."""

from collections.abc import Mapping

from finetune.adapters.reference import LATEST
from finetune.registry.log.commits import Commit


def check_link(commit: Commit, previous: Commit | None) -> list[str]:
    """Return the problems between an entry and the one before it; an empty list when there are none.

    Args:
        commit: the entry.
        previous: the entry before it, None for the first.
    """
    problems = []
    if commit.seq != (1 if previous is None else previous.seq + 1):
        problems.append(f"its `seq` must be {1 if previous is None else previous.seq + 1}, got {commit.seq}")
    if commit.prev != (None if previous is None else previous.digest):
        problems.append(
            "its `prev` must be the digest of the entry before it, and is not, so one of the two was changed"
            if previous
            else "its `prev` must be null, because it is the first entry"
        )
    if commit.op == "publish":
        published = 0 if previous is None else previous.version
        if commit.version != published + 1:
            problems.append(f"it must publish version {published + 1}, got {commit.version}")
    elif previous is None:
        problems.append(f"the op of the first entry must be publish, got {commit.op}")
    elif any(getattr(commit, name) != getattr(previous, name) for name in ("version", "manifest", "summary")):
        problems.append(
            f"its op is {commit.op}, so its newest version must be that of the entry before it, and differs"
        )
    if previous is not None:
        problems.extend(_undue_changes(commit, previous))
    return problems


def _undue_changes(commit: Commit, previous: Commit) -> list[str]:
    """Return a problem for each change of an entry that its ``op`` does not allow."""
    moved = _changed(commit.aliases, previous.aliases) - {LATEST}
    if commit.op == "publish":
        undue = {alias for alias in moved if commit.aliases.get(alias) != commit.version}
    elif commit.op in ("alias", "rollback") and len(moved) == 1:
        undue = moved - commit.aliases.keys()
    else:
        undue = moved
    yanked = _changed(commit.yanked, previous.yanked)
    if len(yanked) == 1 and commit.op == ("yank" if yanked & commit.yanked.keys() else "unyank"):
        yanked = set()
    return [
        f"its op is {commit.op}, which must not change {what} {', '.join(sorted(names))}"
        for what, names in (("aliases:", undue), ("yanked versions:", yanked))
        if names
    ]


def _changed(after: Mapping[str, object], before: Mapping[str, object]) -> set[str]:
    return {key for key in {*after, *before} if after.get(key) != before.get(key)}
