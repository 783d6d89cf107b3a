"""One JSON object a line; the error names anything else that a line, or a whole file, holds."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

from finetune.core import lfs
from finetune.errors import DataError, RowError, brief

if TYPE_CHECKING:
    from pathlib import Path

_DEEPEST = 32  # levels of a row's values
_AS_LINES = (
    "python -c 'import json, sys; [print(json.dumps(row)) for row in json.load(sys.stdin)]' < {name} > rows.jsonl"
)


def read_object(line: bytes, where: str) -> dict[str, Any]:
    """Return the object of one line.

    Raises:
        RowError: it is none, or none that can be used.
    """
    try:
        row = json.loads(line.decode(), object_pairs_hook=_without_duplicates)
    except UnicodeDecodeError as error:
        raise RowError(f"{where}: not UTF-8: {error}", reason="not UTF-8") from None
    except _DuplicateError as error:
        raise RowError(f"{where}: {error}", reason="duplicate key") from None
    except (ValueError, RecursionError) as error:
        raise RowError(f"{where}: not JSON: {error}", reason="not JSON") from None
    if not isinstance(row, dict):
        raise RowError(f"{where}: a row is a JSON object, not {type(row).__name__}", reason="not JSON")
    if line.count(b"[") + line.count(b"{") > _DEEPEST and _depth(row) > _DEEPEST:
        raise RowError(f"{where}: values are nested in more than {_DEEPEST} levels", reason="nested too deep")
    if b"\\ud" in line.lower():  # half of a character that JSON writes as two
        try:
            json.dumps(row, ensure_ascii=False).encode()
        except UnicodeEncodeError as error:
            half = brief(str(error.object)[error.start : error.end])
            fault = f"{where}: the text holds {half}, half of a character (a lone surrogate). Write the whole one."
            raise RowError(fault, reason="not Unicode") from None
    return row


def refuse_other_files(path: Path, data: bytes) -> None:
    """Raise DataError where a file has no object a line, but is readable as something else."""
    if lfs.is_pointer(data):
        raise DataError(f"{path}: {lfs.WAY_OUT}")
    begin = data.lstrip()[:1]
    if begin not in (b"[", b"{"):
        return
    first = next(line for line in data.split(b"\n") if line.strip())
    try:
        json.loads(first.decode())
        alone = True
    except (ValueError, RecursionError):
        alone = False
    if begin == b"{" and alone:
        return
    try:
        text = data.decode().lstrip()
        value, end = json.JSONDecoder().raw_decode(text)
    except (ValueError, RecursionError):
        return
    if isinstance(value, list) and not text[end:].strip() and all(isinstance(row, dict) for row in value):
        raise DataError(
            f"{path}: this is one JSON array, and JSON Lines has one object a line. Convert it: "
            f"{_AS_LINES.format(name=path.name)}"
        )
    if isinstance(value, dict) and not alone:
        raise DataError(
            f"{path}: its first JSON object is spread over several lines, and JSON Lines has one object a line. "
            f"Convert it: jq -c . {path.name} > rows.jsonl"
        )


class _DuplicateError(Exception):
    """The error of a key that stands twice in one object."""


def _without_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        keys = [key for key, _ in pairs]
        twice = next(key for key in keys if keys.count(key) > 1)
        raise _DuplicateError(f"the key {brief(twice, 60)} stands twice, and one of its values would be lost. Keep one")
    return found


def _depth(value: Any) -> int:
    """Return in how many levels values are nested, without recursion."""
    depth, level = 0, [value]
    while level:
        depth += 1
        level = [
            item
            for one in level
            if isinstance(one, dict | list)
            for item in (one.values() if isinstance(one, dict) else one)
        ]
    return depth
