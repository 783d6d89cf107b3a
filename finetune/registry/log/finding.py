"""The meaning of the text after the ``@`` of a reference, given the newest entry of its log."""

from collections.abc import Iterable

from finetune.adapters.reference import LATEST, AdapterRef, folder_hint
from finetune.errors import NotFoundError, YankedError
from finetune.lookup import did_you_mean
from finetune.registry.log.commits import Commit
from finetune.registry.log.log import Log, list_logs
from finetune.registry.storage.store import Store


def find(log: Log, head: Commit, ref: AdapterRef) -> Commit:
    """Return the entry that published the version of ``ref``.

    A reference by number or digest finds a yanked version too.

    Raises:
        NotFoundError: there is no such version or alias; the message names the existing ones.
        YankedError: the alias points to a yanked version.
    """
    number = ref.version if ref.alias is None else head.aliases.get(ref.alias)
    if number is not None and number <= head.version:
        if ref.alias is not None and (reason := head.yanked.get(str(number))) is not None:
            raise YankedError(_why_not(ref, number, reason))
        return log.find_version(number, head)
    found = None if ref.digest is None else log.find_digest(ref.digest, head)
    if found is None:
        hint = "" if ref.alias is None else did_you_mean(ref.alias, head.aliases)
        versions = "version 1" if head.version == 1 else f"versions 1 to {head.version}"
        raise NotFoundError(
            f"{ref} does not exist.{hint} {ref.full_name} has {versions}, and the aliases {_aliases(head)}."
        )
    return found


def none_of_that_name(store: Store, location: str, ref: AdapterRef) -> NotFoundError:
    """Return the error for a name that was never published, with the existing names."""
    names = ["/".join(parts) for parts in list_logs(store)]
    shown = ", ".join(names[:20]) + (f" and {len(names) - 20} more" if len(names) > 20 else "")
    return NotFoundError(
        f"no adapter {ref.full_name!r} in {location}.{did_you_mean(ref.full_name, names)} "
        f"Adapters there: {shown or 'none yet'}.{folder_hint(ref.full_name)}"
    )


def version_before(entries: Iterable[Commit], head: Commit, ref: AdapterRef, alias: str) -> int:
    """Return the version that an alias pointed to before its present one, without the yanked versions.

    A rollback undoes a move and does not count as one: a second rollback moves it one step further back, not forward.

    Args:
        entries: the log, the oldest first.
        head: its newest entry.
        ref: the adapter.
        alias: one of its aliases.

    Raises:
        NotFoundError: the alias never pointed to another version that is not yanked.
    """
    trail: list[int] = []
    for entry in entries:
        now = entry.aliases.get(alias)
        if now is None or trail[-1:] == [now]:
            continue
        if entry.op == "rollback" and now in trail:
            while trail[-1] != now:
                trail.pop()
        else:
            trail.append(now)
    for version in reversed(trail[:-1]):
        if str(version) not in head.yanked and version != trail[-1]:
            return version
    raise NotFoundError(
        f"{ref.full_name}: the alias {alias!r} points to version {head.aliases[alias]}, and never pointed to another "
        "version that is not yanked. Give the version to move it to (`to`)."
    )


def check_exists(head: Commit, ref: AdapterRef, alias: str) -> None:
    """Refuse an alias that does not exist.

    Raises:
        NotFoundError: the alias does not exist; the message names the existing ones.
    """
    if alias not in head.aliases:
        raise NotFoundError(
            f"{ref.full_name} has no alias {alias!r}.{did_you_mean(alias, head.aliases)} "
            f"It has the aliases {_aliases(head)}."
        )


def _why_not(ref: AdapterRef, version: int, reason: str) -> str:
    if ref.alias == LATEST:
        return (
            f"every version of {ref.full_name} is yanked. The reason for the newest, version {version}: {reason}. "
            "Publish another version."
        )
    return (
        f"{ref} points to version {version}, which is yanked: {reason}. Move the alias (`finetune registry alias "
        f"{ref.full_name} {ref.alias} VERSION`), or give the number of a version."
    )


def _aliases(head: Commit) -> str:
    return ", ".join(f"{alias} ({version})" for alias, version in sorted(head.aliases.items()))
