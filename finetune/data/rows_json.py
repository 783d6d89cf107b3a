"""Reading one JSON object a line; the errors name the other content of a line or a file."""

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

    Args:
        line: the line as bytes.
        where: the name of the row in errors: file and line.

    Raises:
        RowError: if the line is not one JSON object, or its values cannot be used.
    """
    try:
        row = json.loads(line.decode(), object_pairs_hook=_without_duplicates)
    except UnicodeDecodeError as error:
        fault = f"{where}: a row must be UTF-8 text, got bytes that are not: {error}. Save the file as UTF-8."
        raise RowError(fault, reason="not UTF-8") from None
    except _DuplicateError as error:
        raise RowError(f"{where}: {error}", reason="duplicate key") from None
    except (ValueError, RecursionError) as error:
        fault = f"{where}: a row must be one JSON object on one line, got text that is not JSON: {error}"
        raise RowError(f"{fault}. Correct the line.", reason="not JSON") from None
    if not isinstance(row, dict):
        raise RowError(
            f"{where}: a row must be a JSON object, got {type(row).__name__}. Write the row as "
            '{"FIELD": VALUE, ...} on one line.',
            reason="not JSON",
        )
    if line.count(b"[") + line.count(b"{") > _DEEPEST and _depth(row) > _DEEPEST:
        raise RowError(
            f"{where}: values must be nested in at most {_DEEPEST} levels, got more. Flatten the row.",
            reason="nested too deep",
        )
    if b"\\ud" in line.lower():  # half of a character that JSON writes as two
        try:
            json.dumps(row, ensure_ascii=False).encode()
        except UnicodeEncodeError as error:
            half = brief(str(error.object)[error.start : error.end])
            raise RowError(
                f"{where}: a text must hold whole characters, got {half}, half of one (a lone surrogate). Write the "
                "whole character.",
                reason="not Unicode",
            ) from None
    return row


def refuse_other_files(path: Path, data: bytes) -> None:
    """Raise DataError if a file does not have one object a line, but is readable as another format."""
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
            f"{path}: a JSON Lines file must have one object a line, got one JSON array. Convert it: "
            f"{_AS_LINES.format(name=path.name)}"
        )
    if isinstance(value, dict) and not alone:
        raise DataError(
            f"{path}: a JSON Lines file must have one object a line, got an object that spreads over several lines. "
            f"Convert it: jq -c . {path.name} > rows.jsonl"
        )


class _DuplicateError(Exception):
    """The error of an object that has one key twice."""


def _without_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        keys = [key for key, _ in pairs]
        twice = next(key for key in keys if keys.count(key) > 1)
        raise _DuplicateError(f"a key must be unique, but {brief(twice, 60)} is given twice. Keep one.")
    return found


def _depth(value: Any) -> int:
    """Return the number of levels in which values are nested, without recursion."""
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
