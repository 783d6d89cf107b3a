"""Strict JSON: one canonical form for writing, and a bounded parser for files from outside."""

import json
from typing import Any

from finetune.errors import ManifestError, brief

MAX_DEPTH = 32  # levels
MAX_VALUES = 150_000  # in memory an object takes many times the 2 bytes of ``[]`` in a file


def canonical_json(value: Any) -> bytes:
    """Return the one byte string of ``value``: sorted keys, no spaces, UTF-8, finite numbers."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False).encode()


def strict_json(raw: bytes, *, source: str, max_bytes: int, max_values: int = MAX_VALUES) -> Any:
    """Parse JSON from outside: UTF-8, bounded in size and depth, no duplicate keys, finite numbers only.

    Args:
        raw: the bytes of the JSON.
        source: the path or name of the JSON, for errors.
        max_bytes: the largest number of bytes.
        max_values: the largest number of values.

    Raises:
        ManifestError: the JSON breaks one of these rules.
    """
    if len(raw) > max_bytes:
        raise ManifestError(f"{source} must have at most {max_bytes} bytes, got {len(raw)}")
    if sum(map(raw.count, (b"[", b"{", b","))) > max_values:  # at least the number of values
        raise ManifestError(f"{source} must hold at most {max_values} values, got more")

    def no_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        out = dict(pairs)
        if len(out) != len(pairs):
            seen: set[str] = set()
            twice = next(k for k, _ in pairs if k in seen or seen.add(k))  # type: ignore[func-returns-value]
            raise ManifestError(f"{source}: a key must be unique, but {brief(twice)} is given twice")
        return out

    def no_constant(name: str) -> Any:
        raise ManifestError(f"{source}: numbers must be finite, got {name}")

    def finite(text: str) -> float:
        number = float(text)
        if number in (float("inf"), float("-inf")):
            raise ManifestError(f"{source}: numbers must be finite 64-bit floats, but {brief(text)} is too large")
        return number

    try:
        text = raw.decode()  # from bytes, the parser would also guess other encodings
        value = json.loads(text, object_pairs_hook=no_duplicates, parse_constant=no_constant, parse_float=finite)
        _check_depth(value, source)
        if "\\u" in text:
            canonical_json(value)  # an escape can make a lone surrogate, which has no UTF-8
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
    return ManifestError(f"{source} must be nested at most {MAX_DEPTH} levels deep, got more")
