"""Strict JSON: one canonical form for writing, and a bounded parser for files from outside."""

import json
from typing import Any

from finetune.errors import ManifestError, brief

MAX_DEPTH = 32  # levels
MAX_VALUES = 150_000  # objects in memory take many times the bytes that the shortest of them, ``[]``, takes in a file


def canonical_json(value: Any) -> bytes:
    """Return the one byte string that stands for ``value``: sorted keys, no spaces, UTF-8, finite numbers."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False).encode()


def strict_json(raw: bytes, *, source: str, max_bytes: int, max_values: int = MAX_VALUES) -> Any:
    """Parse JSON from outside: UTF-8, bounded in size and depth, no duplicate keys, finite numbers only.

    Args:
        raw: the bytes of the JSON.
        source: the place that they came from, for the message.
        max_bytes: the largest number of bytes.
        max_values: the largest number of values.

    Raises:
        ManifestError: with ``source`` and what is wrong.
    """
    if len(raw) > max_bytes:
        raise ManifestError(f"{source}: {len(raw)} bytes; at most {max_bytes} are allowed")
    if sum(map(raw.count, (b"[", b"{", b","))) > max_values:  # no fewer than there are values
        raise ManifestError(f"{source}: more than {max_values} values")

    def no_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        out = dict(pairs)
        if len(out) != len(pairs):
            seen: set[str] = set()
            twice = next(k for k, _ in pairs if k in seen or seen.add(k))  # type: ignore[func-returns-value]
            raise ManifestError(f"{source}: the key {brief(twice)} stands twice")
        return out

    def no_constant(name: str) -> Any:
        raise ManifestError(f"{source}: {name} is not a number that JSON allows")

    def finite(text: str) -> float:
        number = float(text)
        if number in (float("inf"), float("-inf")):
            raise ManifestError(f"{source}: the number {brief(text)} is too large")
        return number

    try:
        text = raw.decode()  # a parser that is given bytes would guess at other encodings too
        value = json.loads(text, object_pairs_hook=no_duplicates, parse_constant=no_constant, parse_float=finite)
        _check_depth(value, source)
        if "\\u" in text:
            canonical_json(value)  # a lone surrogate, which only an escape can make, has no UTF-8
        return value
    except RecursionError:
        raise _too_deep(source) from None
    except ValueError as error:
        if isinstance(error, ManifestError):
            raise
        raise ManifestError(f"{source}: not JSON: {error}") from None


def _check_depth(value: Any, source: str) -> None:
    level = [value] if isinstance(value, (dict, list)) else []
    for _ in range(MAX_DEPTH):
        level = [
            below
            for each in level
            for below in (each.values() if isinstance(each, dict) else each)
            if isinstance(below, (dict, list))
        ]
        if not level:
            return
    raise _too_deep(source)


def _too_deep(source: str) -> ManifestError:
    return ManifestError(f"{source}: nested deeper than {MAX_DEPTH} levels")
