"""The index that makes ``list`` fast: a file in the cache that may be missing, damaged or old at any time.

It holds the newest entry that the index has seen of each adapter, and its row in ``list``. The row is used only
when that entry is unchanged and still the newest; otherwise the log is read. So an index never makes an answer wrong,
and needs no maintenance.
"""

import json
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from finetune.adapters.manifest import sha256_hex
from finetune.adapters.manifest_schema_2 import summary_from_schema_2
from finetune.core.cache import cache_home, read_note, write_note
from finetune.errors import FinetuneError
from finetune.registry.log.commits import log_key, split_log_key
from finetune.registry.log.versions import Version
from finetune.registry.storage.store import HasFolders, ObjectMeta, Store, exists, spares_others

# Reads a log: namespace, name and the number of an existing entry (0: none known) -> the latest version of the
# adapter, and the number of the newest entry; None when there is no such adapter.
ReadLatest = Callable[[str, str, int], tuple[Version, int] | None]
# Takes the name of an adapter that cannot be read, and the error.
OnError = Callable[[str, FinetuneError], None]


@dataclass(frozen=True, kw_only=True)
class _Known:
    seq: int  # of the newest entry, like the three fields below
    key: str
    size: int
    modified: str
    version: Version

    def is_of(self, newest: ObjectMeta) -> bool:
        return (self.key, self.size, self.modified) == (newest.key, newest.size, newest.modified.isoformat())


class ListIndex:
    """The index of one registry.

    Args:
        uuid: the uuid of the registry.
        location: the location of the registry, so that a copy of it has an index of its own.
    """

    def __init__(self, uuid: str, location: str) -> None:
        self.path = cache_home() / "registries" / f"{sha256_hex(f'{uuid} {location}'.encode())}.json"

    def forget(self) -> None:
        """Delete the index."""
        self.path.unlink(missing_ok=True)

    def latest(self, store: Store, namespace: str | None, read: ReadLatest, onerror: OnError) -> list[Version]:
        """Return the latest version of each adapter, sorted by name; the index is brought up to date.

        Args:
            store: the store of the registry.
            namespace: the namespace to list; None for all.
            read: called for each adapter of which the index does not know the newest entry.
            onerror: called for each adapter that cannot be read, which is left out.
        """
        known = _load(self.path)
        now: dict[str, _Known] = {}
        changed = False
        for space, name, seq, newest in _newest(store, namespace, known):
            full_name = f"{space}/{name}"
            if newest is not None and full_name in known and known[full_name].is_of(newest):
                now[full_name] = known[full_name]
                continue
            try:
                found = read(space, name, seq)
                head = None if found is None else store.head(log_key(space, name, found[1]))
            except FinetuneError as error:
                if not spares_others(error):
                    raise
                onerror(full_name, error)
                continue
            if found is not None and head is not None:
                changed = True
                facts: dict[str, Any] = {"key": head.key, "size": head.size, "modified": head.modified.isoformat()}
                now[full_name] = _Known(seq=found[1], version=found[0], **facts)
        outside = {n: k for n, k in known.items() if namespace is not None and not n.startswith(f"{namespace}/")}
        if changed or len(outside) + len(now) != len(known):
            _save(self.path, outside | now)
        return [now[full_name].version for full_name in sorted(now, key=lambda full_name: full_name.split("/"))]


def _newest(
    store: Store, namespace: str | None, known: dict[str, _Known]
) -> Iterator[tuple[str, str, int, ObjectMeta | None]]:
    """Yield namespace and name of each adapter, the number of an entry, and the entry's meta if it is the newest."""
    if isinstance(store, HasFolders):  # a look at one key costs next to nothing there
        for space in store.folders("names") if namespace is None else [namespace]:
            for name in store.folders(f"names/{space}"):
                if split_log_key(log_key(space, name, 1)) is None:
                    continue
                seen = known.get(f"{space}/{name}")
                newest = None if seen is None else _if_newest(store, space, name, seen.seq)
                yield space, name, 0, newest
        return
    newest_of: dict[tuple[str, str], tuple[int, ObjectMeta]] = {}
    for meta in store.list("names" if namespace is None else f"names/{namespace}"):
        parts = split_log_key(meta.key)
        if parts is not None and parts[2] > newest_of.get(parts[:2], (0,))[0]:
            newest_of[parts[:2]] = parts[2], meta
    for (space, name), (seq, meta) in newest_of.items():
        yield space, name, seq, meta


def _if_newest(store: Store, space: str, name: str, seq: int) -> ObjectMeta | None:
    """Return the ``seq``-th entry when it is there and none follows; entries have no gaps."""
    try:
        found = store.head(log_key(space, name, seq))
        return None if exists(store, log_key(space, name, seq + 1)) else found
    except FinetuneError as error:
        if not spares_others(error):
            raise
        return None  # the read of the log that follows reports the error


def _load(path: Path) -> dict[str, _Known]:
    """Return the contents of an index file; an empty dict when there is none, or it is damaged."""
    try:
        names: dict[str, dict[str, Any]] = json.loads(read_note(path) or "{}")
        return {name: _known(fields) for name, fields in names.items()}
    except (ValueError, TypeError, KeyError, AttributeError):  # damaged, or of another release
        return {}


def _known(fields: dict[str, Any]) -> _Known:
    version = fields["version"]
    version |= {"aliases": tuple(version["aliases"]), "summary": summary_from_schema_2(version["summary"])}
    return _Known(**fields | {"version": Version(**version)})


def _save(path: Path, names: dict[str, _Known]) -> None:
    write_note(path, json.dumps({name: asdict(known) for name, known in names.items()}))
