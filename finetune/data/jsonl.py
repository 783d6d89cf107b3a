"""Rows from JSON Lines files beside their pictures."""

import json
from pathlib import Path
from typing import Any

from finetune.data.bad_rows import BadRows
from finetune.data.fields import RawRow, to_example
from finetune.errors import DataError, RowError
from finetune.example import Example
from finetune.recipe import JsonlData, TaskSection


def read_jsonl(
    section: JsonlData, split: str, *, task: TaskSection, seed: int, bad: BadRows, limit: int | None = None
) -> list[Example]:
    """Reads the file of one split.

    Args:
        section: the recipe's data section.
        split: ``train``, ``val`` or ``test``.
        task: how a question is put.
        seed: the run's; unused, since the file has an order.
        bad: where rows go that cannot be used.
        limit: number of rows to read from the file's beginning; None for all.

    Raises:
        DataError: naming the file.
    """
    root = Path(section.root)
    path = root / getattr(section, split)
    try:
        lines = path.read_bytes().removeprefix(b"\xef\xbb\xbf").split(b"\n")
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror}). Check data.root and data.{split}.") from None
    examples = []
    for number, line in enumerate(lines, start=1):
        if limit is not None and bad.tried >= limit:
            break
        if line.strip():
            with bad.row():
                where = f"{path}, line {number}"
                row = RawRow(id=f"{path.name}:{number}", where=where, fields=_object(line, where))
                examples.append(to_example(row, section, task, root=root, bad=bad))
    if not bad.tried:
        raise DataError(f"{path}: no rows")
    return examples


def _object(line: bytes, where: str) -> dict[str, Any]:
    try:
        row = json.loads(line.decode())
    except UnicodeDecodeError as error:
        raise RowError(f"{where}: not UTF-8: {error}", reason="not UTF-8") from None
    except (ValueError, RecursionError) as error:
        raise RowError(f"{where}: not JSON: {error}", reason="not JSON") from None
    if not isinstance(row, dict):
        raise RowError(f"{where}: a row is a JSON object, not {type(row).__name__}", reason="not JSON")
    return row
