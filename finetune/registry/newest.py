"""How the newest entry of a log is found with few requests, when nothing but the entries themselves is believed."""

from collections.abc import Callable, Iterable

# Steps of the first look ahead, short for most logs are.
NEARBY = (1, 3, 12)
# Whoever writes an entry whose number is a multiple of this leaves a hint; so the newest is less than this after it.
HINT_EVERY = 16
# Steps where no hint is of use: a log of 10,000 entries takes 19 requests then, one of a million 29.
FAR = tuple(1 << power for power in range(14, 40, 4))

Found = tuple[int, bytes | None]  # number and bytes of an entry; no bytes when it was not fetched


def find_newest(fetch: Callable[[int], bytes | None], read_hint: Callable[[], int], known: int) -> Found:
    """Returns the newest entry of a log whose entries have no gaps.

    Args:
        fetch: returns the bytes of the entry with a number, or None where there is none; a request.
        read_hint: returns the number of an entry that may be not far from the newest, 0 for none; a request. It may
            be behind, lost or wrong, which costs requests and nothing else.
        known: number of an entry that was seen, 0 for none.

    Returns:
        Its number, 0 when there is none, and its bytes, None when it is ``known``.
    """
    # An entry exists up to the newest and none after it, so one that is there and one that is missing enclose it.
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
    """Returns the last entry that was found by going on in ``steps``, and the number that was missing, if one was."""
    for step in steps:
        number = there[0] + step
        if (raw := fetch(number)) is None:
            return there, number
        there = number, raw
    return there, None
