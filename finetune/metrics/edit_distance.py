"""The edit distance of two sequences: the fewest items to insert, delete or replace."""

from collections.abc import Hashable, Sequence


def edit_distance(one: Sequence[Hashable], other: Sequence[Hashable]) -> int:
    """Return the Levenshtein distance; the differences in a column of the usual table are the bits of two numbers.

    After Hyyrö 2003 (A bit-vector algorithm for computing Levenshtein and Damerau edit distances), in its terms: ``up``
    is VP, ``down`` VN, ``plus`` HP and ``minus`` HN.
    """
    if not one:
        return len(other)
    places: dict[Hashable, int] = {}
    for i, item in enumerate(one):
        places[item] = places.get(item, 0) | 1 << i
    all_bits, last = (1 << len(one)) - 1, 1 << (len(one) - 1)
    up, down, distance = all_bits, 0, len(one)
    for item in other:
        match = places.get(item, 0)
        diagonal = ((((match & up) + up) ^ up) | match | down) & all_bits
        plus = down | (all_bits & ~(diagonal | up))
        minus = up & diagonal
        distance += bool(plus & last) - bool(minus & last)
        plus, minus = (plus << 1 | 1) & all_bits, (minus << 1) & all_bits
        up = minus | (all_bits & ~(diagonal | plus))
        down = plus & diagonal
    return distance
