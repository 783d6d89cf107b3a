"""The checks that an entry of a log follows the one before it."""

from collections.abc import Mapping

from finetune.adapters.reference import LATEST
from finetune.registry.log.commits import Commit


def check_link(commit: Commit, previous: Commit | None) -> list[str]:
    """Return the problems between an entry and the one before it; none when they belong together.

    Args:
        commit: the entry.
        previous: the entry before it, None for the first.
    """
    problems = []
    if commit.seq != (1 if previous is None else previous.seq + 1):
        problems.append(f"it says that it is entry {commit.seq}")
    if commit.prev != (None if previous is None else previous.digest):
        problems.append(
            "its prev is not the digest of the entry before it, so one of the two was changed"
            if previous
            else "it is the first entry, but names one before it"
        )
    if commit.op == "publish":
        published = 0 if previous is None else previous.version
        if commit.version != published + 1:
            problems.append(f"it publishes version {commit.version} after version {published}")
    elif previous is None:
        problems.append(f"its op is {commit.op}, before anything was published")
    elif any(getattr(commit, name) != getattr(previous, name) for name in ("version", "manifest", "summary")):
        problems.append(f"its op is {commit.op}, but its newest version differs from that of the entry before it")
    if previous is not None:
        problems.extend(_undue_changes(commit, previous))
    return problems


def _undue_changes(commit: Commit, previous: Commit) -> list[str]:
    """Return the changes of an entry that its ``op`` does not allow."""
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
        f"its op is {commit.op}, but it changes {what} {', '.join(sorted(names))}"
        for what, names in (("aliases:", undue), ("what is yanked:", yanked))
        if names
    ]


def _changed(after: Mapping[str, object], before: Mapping[str, object]) -> set[str]:
    return {key for key in {*after, *before} if after.get(key) != before.get(key)}
