"""The hint of a log: the newest version at some of its entries.

It saves requests in a search of the log. The search confirms it by the entries themselves: when the hint is old,
missing or wrong, the search takes longer and finds the same.
"""

from collections.abc import Iterable

from finetune.adapters.manifest import canonical_json, strict_json
from finetune.errors import FinetuneError
from finetune.registry.log.commits import Commit, hint_key
from finetune.registry.storage.store import Store, read_all

# The writer of an entry whose number is a multiple of this writes the hint too. So the newest entry is less than this
# after the last entry of the hint, or little more when two writers wrote the hint at once.
HINT_EVERY = 16
MAX_PLACES = 512
MAX_HINT_BYTES = 32 * MAX_PLACES

Place = tuple[int, int]  # number of an entry, and the version that was the newest then


def read_hint(store: Store, namespace: str, name: str) -> list[Place]:
    """Return the places of a log, ascending, the last one near the newest entry; none where there is no hint."""
    key = hint_key(namespace, name)
    try:
        raw = read_all(store, key, max_bytes=MAX_HINT_BYTES)
        places = [(seq, version) for seq, version in strict_json(raw, source=key, max_bytes=MAX_HINT_BYTES)]
    except (FinetuneError, TypeError, ValueError):
        return []
    possible = all(type(number) is int for place in places for number in place) and all(
        before[0] < place[0] and before[1] <= place[1] for before, place in zip([(0, 0), *places], places, strict=False)
    )
    return places if possible else []


def write_hint(store: Store, namespace: str, name: str, commit: Commit) -> None:
    """Add an entry to the hint; a hint that is too long loses every second place.

    Raises:
        StoreError: the hint cannot be written.
    """
    places = read_hint(store, namespace, name)
    places = [place for place in places if place[0] < commit.seq and place[1] <= commit.version]
    places.append((commit.seq, commit.version))
    if len(places) > MAX_PLACES:
        places = places[1::2]
    store.put(hint_key(namespace, name), canonical_json(places), mode="overwrite")


def around(places: Iterable[Place], version: int, head: Commit) -> tuple[Place, Place]:
    """Return the last place before the entry that published ``version``, and the first that is not before it."""
    before, after = (0, 0), (head.seq, head.version)
    for place in places:
        if place[0] < head.seq:
            if place[1] < version:
                before = place
            else:
                return before, place
    return before, after
