"""The search for an entry of a log with few requests, which relies on the entries alone."""

from collections.abc import Callable, Iterable

from finetune.registry.log.commits import Commit
from finetune.registry.log.hint import HINT_EVERY, Place

# The first steps ahead; they are short, because most logs are.
NEARBY = (1, 3, 12)
# The steps without a usable hint: a log of 10,000 entries takes 19 requests, a log of a million entries 29.
FAR = tuple(1 << power for power in range(14, 40, 4))
# The number of guesses in proportion to the version; after them, each guess halves the rest.
GUESSES_BY_SHARE = 3

Found = tuple[int, bytes | None]  # number and bytes of an entry; no bytes when it was not fetched


def find_newest(fetch: Callable[[int], bytes | None], read_hint: Callable[[], int], known: int) -> Found:
    """Return the newest entry of a log whose entries have no gaps.

    Args:
        fetch: the function that returns the bytes of the entry with a number, or None where there is none; a request.
        read_hint: the function that returns the number of an entry near the newest, 0 for none; a request. The number
            may be behind, lost or wrong, which costs requests and nothing else.
        known: the number of an entry that was seen, 0 for none.

    Returns:
        Its number, 0 when there is none, and its bytes, None when it is ``known``.
    """
    # All entries up to the newest exist and none after it, so an existing and a missing one enclose the newest.
    there, missing = _climb(fetch, (known, None), NEARBY)
    if missing is None:
        hint = read_hint()
        if hint > there[0] and (raw := fetch(hint)) is not None:
            there = hint, raw
        if hint:
            there, missing = _climb(fetch, there, [HINT_EVERY])
    if missing is None:
        there, missing = _climb(fetch, there, FAR)
    assert missing is not None, "the keys of entries have twelve digits"
    while missing - there[0] > 1:
        middle = (there[0] + missing) // 2
        if (raw := fetch(middle)) is None:
            missing = middle
        else:
            there = middle, raw
    return there


def _climb(fetch: Callable[[int], bytes | None], there: Found, steps: Iterable[int]) -> tuple[Found, int | None]:
    """Return the last entry found on the way in ``steps``, and the first missing number; None for none."""
    for step in steps:
        number = there[0] + step
        if (raw := fetch(number)) is None:
            return there, number
        there = number, raw
    return there, None


def find_version(read: Callable[[int], Commit], version: int, before: Place, after: Place) -> tuple[Commit | None, int]:
    """Return the entry that published a version.

    Args:
        read: the function that returns the entry with a number; a request.
        version: the version to find.
        before: a place before that entry.
        after: a place that is not before it.

    Returns:
        The entry and its number. When the log lacks it or the places are wrong: None, and the last number that it could
        have.
    """
    guesses = 0
    # Each entry publishes at most one version, so few entries are left between the places when most are publishes.
    while (first := before[0] + version - before[1]) <= (last := after[0] - (after[1] - version)):
        share = (after[0] - before[0]) / max(1, after[1] - before[1])
        guess = before[0] + round((version - before[1]) * share) if guesses < GUESSES_BY_SHARE else (first + last) // 2
        guesses += 1
        commit = read(min(max(guess, first), last))
        publishes = commit.op == "publish"
        if publishes and commit.version == version:
            return commit, commit.seq
        if commit.version < version:
            before = commit.seq, commit.version
        else:
            after = commit.seq - 1, commit.version - publishes
    return None, first
