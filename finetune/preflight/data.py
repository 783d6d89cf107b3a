"""Checks of the data of a recipe: the files of every split, and their first rows."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

from finetune.data.arrow import parquet_files
from finetune.data.bad_rows import BadRows
from finetune.data.columns import require_columns
from finetune.data.jsonl import read_jsonl
from finetune.errors import DataError
from finetune.lookup import did_you_mean
from finetune.recipe import ColumnData, HubData, JsonlData, MixData, ParquetData, SavedData

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from finetune.recipe import RowsSection, TaskSection

HEAD_ROWS = 3  # the number of rows of each split that are checked


def check_paths(data: RowsSection, splits: Sequence[str]) -> None:
    """Check that the files of every split exist.

    Args:
        data: the recipe's data section.
        splits: the splits that the command reads.

    Raises:
        DataError: a file is missing; the message names the key of the recipe and the path.
    """
    for section in _sections(data):
        _check_root(section)
        for split in splits:
            if (name := getattr(section, split, None)) is None:
                continue
            root = Path(getattr(section, "root", None) or ".")
            if isinstance(section, JsonlData) and not (root / name).is_file():
                raise DataError(f"{root / name}: no such file. {_what_to_do(section, split, root)}")
            if isinstance(section, SavedData) and not (root / name / "dataset_info.json").is_file():
                raise DataError(
                    f"{root / name}: it must be a folder that datasets' save_to_disk wrote, but dataset_info.json is "
                    f"missing. {_what_to_do(section, split, root)}"
                )
            if isinstance(section, ParquetData) and not any(path.is_file() for path in root.glob(name)):
                _refuse_pattern(section, split, root)


def check_heads(data: RowsSection, splits: Sequence[str], *, task: TaskSection) -> None:
    """Check that the first rows of every split have the fields that the recipe names.

    For tables, it checks the columns. It fetches no data set of the hub. Image files must exist, but it opens none.

    Args:
        data: the recipe's data section.
        splits: the splits that the command reads.
        task: the task section, which defines the fields that a row needs.

    Raises:
        DataError: a field is missing; the message names file and row.
    """
    for section in _sections(data):
        for split in splits:
            if getattr(section, split, None) is None:
                continue
            if isinstance(section, JsonlData):
                _check_rows(section, split, task)
            elif isinstance(section, ParquetData):
                _check_columns(section, split, task)
            elif isinstance(section, SavedData):
                _check_features(section, split, task)


def _sections(data: RowsSection) -> Iterator[RowsSection]:
    if isinstance(data, MixData):
        for name in data.sources:
            yield data.part(name)
    else:
        yield data


def _check_root(section: RowsSection) -> None:
    root = getattr(section, "root", None)
    if root is None or Path(root).is_dir():
        return
    where = "" if Path(root).is_absolute() else f" below {Path.cwd()}"
    parent = Path(root).parent
    folders = [str(path) for path in parent.iterdir() if path.is_dir()] if parent.is_dir() else []
    what = "it must be a folder, got a file" if Path(root).exists() else f"no such folder{where}"
    files = f" It must hold the files of {section.name}." if isinstance(section, HubData) else ""
    raise DataError(f"data.root={root}: {what}.{did_you_mean(root, folders)}{files}")


def _what_to_do(section: ColumnData, split: str, root: Path) -> str:
    if split == "train":
        return "Check data.root and data.train."
    if split not in section.model_fields_set:
        name = getattr(section, split)
        use = "validation" if split == "val" else "evaluation"
        return (
            f"data.{split} is {name} by default. Set data.{split} to the file for {use}, or set data.{split}: null for "
            "none."
        )
    return f"Check data.root and data.{split}, or set data.{split}: null."


def _refuse_pattern(section: ParquetData, split: str, root: Path) -> None:
    try:
        parquet_files(section, split)
    except DataError as error:
        raise DataError(f"{error} {_what_to_do(section, split, root)}") from None


def _check_rows(section: JsonlData, split: str, task: TaskSection) -> None:
    bad = BadRows(split, on_error=section.on_error, log=lambda _: None)
    read_jsonl(section, split, task=task, seed=0, bad=bad, limit=HEAD_ROWS)


def _check_columns(section: ParquetData, split: str, task: TaskSection) -> None:
    import pyarrow
    import pyarrow.parquet as pq

    path = parquet_files(section, split)[0]
    try:
        columns = pq.read_schema(path).names
    except (OSError, pyarrow.ArrowException) as error:
        reason = str(error).strip().splitlines()[0]
        raise DataError(f"{path}: not a readable Parquet file: {reason}. Check data.root and data.{split}.") from None
    require_columns(section, columns, task, where=str(path))


def _check_features(section: SavedData, split: str, task: TaskSection) -> None:
    folder = Path(section.root) / getattr(section, split)
    try:
        features = json.loads((folder / "dataset_info.json").read_bytes())["features"]
    except (OSError, ValueError, KeyError, TypeError):
        return  # datasets raises an error with the cause
    if isinstance(features, dict):
        require_columns(section, list(features), task, where=str(folder))
