"""Rows from tables: Parquet files, and folders that ``datasets`` saved."""

from __future__ import annotations

from bisect import bisect_right
from pathlib import Path
from typing import TYPE_CHECKING, Any

from finetune.core import lfs
from finetune.core.cache import conversions_of
from finetune.data.columns import require_columns
from finetune.data.fields import RawRow, to_example
from finetune.data.other_fields import read_fields, refused_columns, unread_columns
from finetune.data.stored_images import stored_images
from finetune.errors import DataError

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Iterator

    from datasets import ClassLabel, Dataset, Features

    from finetune.core.example import Example
    from finetune.data.bad_rows import BadRows
    from finetune.recipe import ColumnData, ParquetData, SavedData, TaskSection

_IMAGE_KEYS = ("image", "images")


def read_parquet(section: ParquetData, split: str, *, task: TaskSection, seed: int, bad: BadRows) -> list[Example]:
    """Read the Parquet files of one split; arguments as for ``read_jsonl``.

    The files are converted once into memory-mapped Arrow files below ``cache_home()``, because a single row of a
    Parquet file cannot be read.

    Raises:
        DataError: if the files cannot be read, have no rows or differ in their columns, or a row cannot be used.
    """
    import pyarrow
    import pyarrow.parquet as pq
    from datasets import Dataset
    from datasets.exceptions import DatasetsError

    root, pattern = Path(section.root), getattr(section, split)
    files = parquet_files(section, split)
    starts = [0]
    for path in files:
        try:
            starts.append(starts[-1] + pq.read_metadata(path).num_rows)
        except (OSError, pyarrow.ArrowException) as error:
            cause = f"not a readable Parquet file: {_first_line(error).rstrip('.')}. Write the file again."
            raise DataError(f"{path}: {lfs.WAY_OUT if lfs.is_pointer_file(path) else cause}") from None
    if not starts[-1]:
        raise DataError(f"{root}/{pattern}: the files must have at least one row, got none. Check data.{split}.")
    try:
        dataset = Dataset.from_parquet([str(path) for path in files], cache_dir=str(conversions_of(files)))
    except (OSError, ValueError, pyarrow.ArrowException, DatasetsError) as error:
        fault = "the files must be readable Parquet files with the same columns, but reading them failed"
        raise DataError(f"{root}/{pattern}: {fault}: {_first_line(error.__cause__ or error)}") from None

    def place(row: int) -> tuple[str, str]:
        number = bisect_right(starts, row) - 1
        return f"{files[number].name}:{row - starts[number]}", f"{files[number]}, row {row - starts[number]}"

    return table_examples(dataset, section, place, what=f"{root}/{pattern}", task=task, root=root, bad=bad)


def parquet_files(section: ParquetData, split: str) -> list[Path]:
    """Return the files of one split, at least one.

    Raises:
        DataError: if no file matches the pattern of the split.
    """
    root, pattern = Path(section.root), getattr(section, split)
    files = sorted(path for path in root.glob(pattern) if path.is_file())
    if not files:
        there = ", ".join(sorted(str(path.relative_to(root)) for path in root.rglob("*.parquet"))[:20]) or "none"
        raise DataError(
            f"{root}: data.{split} must match at least one file, got {pattern}, which matches none. Parquet files "
            f"there: {there}."
        )
    return files


def read_saved(section: SavedData, split: str, *, task: TaskSection, seed: int, bad: BadRows) -> list[Example]:
    """Read one split of a folder that ``save_to_disk`` wrote; arguments as for ``read_jsonl``.

    Raises:
        DataError: if the folder holds no data set that can be loaded, or a row cannot be used.
    """
    import pyarrow
    from datasets import load_from_disk

    root, name = Path(section.root), getattr(section, split)
    folder = root / name
    if not (folder / "dataset_info.json").is_file():
        there = ", ".join(sorted(str(p.parent.relative_to(root)) for p in root.glob("**/dataset_info.json"))) or "none"
        raise DataError(
            f"{folder}: the folder must hold a data set that datasets saved, got no dataset_info.json. Data sets below "
            f"{root}: {there}. Set data.{split} to one of them, or to null."
        )
    for path in folder.iterdir():
        if lfs.is_pointer_file(path):
            raise DataError(f"{path}: {lfs.WAY_OUT}")
    try:
        dataset = load_from_disk(str(folder))
    except (OSError, ValueError, KeyError, TypeError, pyarrow.ArrowException) as error:
        cause = _first_line(error).rstrip(".")
        raise DataError(f"{folder}: the data set cannot be loaded: {cause}. Save it again with save_to_disk.") from None

    def place(row: int) -> tuple[str, str]:
        return f"{name}:{row}", f"{folder}, row {row}"

    return table_examples(dataset, section, place, what=str(folder), task=task, root=root, bad=bad)


def table_examples(
    dataset: Dataset,
    section: ColumnData,
    place: Callable[[int], tuple[str, str]],
    *,
    what: str,
    task: TaskSection,
    root: Path,
    bad: BadRows,
) -> list[Example]:
    """Make the examples of a table.

    Args:
        dataset: the table.
        section: the section that names the columns.
        place: the function that returns a row's id, and its name in errors, for a row number.
        what: the name of the table in errors.
        task: the section of the task that puts the questions.
        root: the folder that paths of images are relative to.
        bad: the record of the rows that cannot be used.

    Raises:
        DataError: if the table has no rows or lacks a column, or a row cannot be used.
    """
    require_columns(section, dataset.column_names, task, where=what)
    if not len(dataset):
        raise DataError(f"{what}: the table must have at least one row, got none. Name another split or file.")
    named = [getattr(section, key) for key in _IMAGE_KEYS]
    images = [name for name in named if _holds_images(dataset, name)]
    texts = [name for name in read_fields(section, task) if name in dataset.column_names and name not in images]
    columns: dict[str, Iterator[Any]] = {name: stored_images(dataset, name, root=root, place=place) for name in images}
    columns |= {name: _shown(dataset, name) for name in refused_columns(section, task, dataset.column_names)}
    bad.unread.update(dict.fromkeys(unread_columns(section, task, dataset.column_names), len(dataset)))
    examples = []
    for number, fields in enumerate(_text_rows(dataset, texts)):
        for name, values in columns.items():
            fields[name] = next(values)
        with bad.row():
            row_id, where = place(number)
            row = RawRow(id=row_id, where=where, fields=fields)
            examples.append(to_example(row, section, task, root=root, bad=bad))
    return examples


def _shown(dataset: Dataset, column: str) -> Iterator[Any]:
    """Yield the value of each row in a column; of a value that is neither text nor number, yield its type."""
    import pyarrow as pa

    for piece in dataset.select_columns([column]).with_format("arrow").iter(batch_size=1000):
        cells = piece.column(0)
        arrow_type = cells.type
        is_text = pa.types.is_string(arrow_type) or pa.types.is_large_string(arrow_type)
        plain = is_text or pa.types.is_primitive(arrow_type)
        several = pa.types.is_list(arrow_type) or pa.types.is_large_list(arrow_type)
        for cell in cells:
            if plain or not cell.is_valid:
                yield cell.as_py()
            else:  # a medium is refused without decoding it
                yield [] if several and not len(cell.values) else f"a value of type {arrow_type}"


def _holds_images(dataset: Dataset, column: str | None) -> bool:
    """Return whether a column holds images; a column of texts holds their paths."""
    import pyarrow as pa

    if column not in dataset.column_names:
        return False
    arrow_type = dataset.features.arrow_schema.field(column).type
    while pa.types.is_list(arrow_type) or pa.types.is_large_list(arrow_type):
        arrow_type = arrow_type.value_type
    return pa.types.is_struct(arrow_type) or pa.types.is_binary(arrow_type) or pa.types.is_large_binary(arrow_type)


def _text_rows(dataset: Dataset, columns: list[str]) -> Iterator[dict[str, Any]]:
    """Yield the other columns of each row; a label stored as a number becomes its name."""
    labels = class_labels(dataset.features, columns)
    for row in dataset.select_columns(columns):
        named = {name: label.int2str(row[name]) for name, label in labels.items() if row[name] is not None}
        yield {**row, **named}


def class_labels(features: Features | None, columns: Collection[str]) -> dict[str, ClassLabel]:
    """Return the columns whose numbers stand for names; none if the features of the table are not known."""
    from datasets import ClassLabel

    return {name: feature for name in columns if features and isinstance(feature := features[name], ClassLabel)}


def _first_line(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]
