"""Rows from JSON Lines files beside their images."""

from pathlib import Path

from finetune.core.example import Example
from finetune.data.bad_rows import BadRows
from finetune.data.fields import RawRow, to_example
from finetune.data.rows_json import read_object, refuse_other_files
from finetune.errors import DataError
from finetune.recipe import JsonlData, TaskSection


def read_jsonl(
    section: JsonlData, split: str, *, task: TaskSection, seed: int, bad: BadRows, limit: int | None = None
) -> list[Example]:
    """Read the file of one split.

    Args:
        section: the recipe's data section.
        split: the name of the split: ``train``, ``val`` or ``test``.
        task: the section of the task that puts the questions.
        seed: the seed of the run; unused, because the file has an order.
        bad: the record of the rows that cannot be used.
        limit: the number of rows to read from the beginning of the file; None for all.

    Raises:
        DataError: if the file cannot be read, or a row cannot be used; the message names the file and the line.
    """
    root = Path(section.root)
    path = root / getattr(section, split)
    try:
        data = path.read_bytes().removeprefix(b"\xef\xbb\xbf")
    except (OSError, ValueError) as error:
        raise DataError(
            f"{path}: cannot be read ({getattr(error, 'strerror', None) or error}). Check data.root and data.{split}."
        ) from None
    refuse_other_files(path, data)
    examples = []
    for number, line in enumerate(data.split(b"\n"), start=1):
        if limit is not None and bad.tried >= limit:
            break
        if line.strip():
            with bad.row():
                where = f"{path}, line {number}"
                row = RawRow(id=f"{path.name}:{number}", where=where, fields=read_object(line, where))
                examples.append(to_example(row, section, task, root=root, bad=bad))
    if not bad.tried:
        raise DataError(f"{path}: the file must have at least one row, got none. Check data.root and data.{split}.")
    return examples
