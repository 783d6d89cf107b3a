"""Rows from tables: Parquet files and folders saved by ``datasets``. Images stay on disk until they are opened."""

from __future__ import annotations

import pickle
from bisect import bisect_right
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from finetune.core import lfs
from finetune.core.cache import conversions_of
from finetune.core.file_state import file_key, is_settled
from finetune.data.fields import RawRow, require_columns, to_example
from finetune.data.other_fields import read_fields, refused_columns, unread_columns
from finetune.errors import DataError, RowError

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Iterator

    from datasets import ClassLabel, Dataset, Features
    from pyarrow import Array

    from finetune.core.example import Example
    from finetune.data.bad_rows import BadRows
    from finetune.recipe import ColumnData, ParquetData, SavedData, TaskSection

_IMAGE_KEYS = ("image", "images")


def read_parquet(section: ParquetData, split: str, *, task: TaskSection, seed: int, bad: BadRows) -> list[Example]:
    """Read the Parquet files of one split; arguments as ``read_jsonl``.

    They are converted once into memory-mapped Arrow files below ``cache_home()``: single rows of a Parquet file cannot
    be read.
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
            fault = lfs.WAY_OUT if lfs.is_pointer_file(path) else f"not a readable Parquet file: {_first_line(error)}"
            raise DataError(f"{path}: {fault}") from None
    if not starts[-1]:
        raise DataError(f"{root}/{pattern}: no rows")
    try:
        dataset = Dataset.from_parquet([str(path) for path in files], cache_dir=str(conversions_of(files)))
    except (OSError, ValueError, pyarrow.ArrowException, DatasetsError) as error:
        cause = error.__cause__ or error
        raise DataError(f"{root}/{pattern}: not readable Parquet files of one layout: {_first_line(cause)}") from None

    def place(row: int) -> tuple[str, str]:
        number = bisect_right(starts, row) - 1
        return f"{files[number].name}:{row - starts[number]}", f"{files[number]}, row {row - starts[number]}"

    return table_examples(dataset, section, place, what=f"{root}/{pattern}", task=task, root=root, bad=bad)


def parquet_files(section: ParquetData, split: str) -> list[Path]:
    """Return the files of one split, at least one."""
    root, pattern = Path(section.root), getattr(section, split)
    files = sorted(path for path in root.glob(pattern) if path.is_file())
    if not files:
        there = ", ".join(sorted(str(path.relative_to(root)) for path in root.rglob("*.parquet"))[:20]) or "none"
        raise DataError(f"{root}: no file fits data.{split}={pattern}. Parquet files there: {there}.")
    return files


def read_saved(section: SavedData, split: str, *, task: TaskSection, seed: int, bad: BadRows) -> list[Example]:
    """Read one split of a folder that ``save_to_disk`` wrote; arguments as ``read_jsonl``."""
    import pyarrow
    from datasets import load_from_disk

    root, name = Path(section.root), getattr(section, split)
    folder = root / name
    if not (folder / "dataset_info.json").is_file():
        there = ", ".join(sorted(str(p.parent.relative_to(root)) for p in root.glob("**/dataset_info.json"))) or "none"
        raise DataError(
            f"{folder}: datasets saved no data set there. Data sets below {root}: {there}. Set data.{split} to one of "
            "them, or to null."
        )
    for path in folder.iterdir():
        if lfs.is_pointer_file(path):
            raise DataError(f"{path}: {lfs.WAY_OUT}")
    try:
        dataset = load_from_disk(str(folder))
    except (OSError, ValueError, KeyError, TypeError, pyarrow.ArrowException) as error:
        raise DataError(f"{folder}: cannot be loaded: {_first_line(error)}") from None

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
        section: the section that names its columns.
        place: each row number -> the row's id, and its place for errors.
        what: the name of the table in errors.
        task: the section of the task that puts the questions.
        root: the folder that paths of images are relative to.
        bad: the record of the rows that cannot be used.

    Raises:
        DataError: the table has no rows, or not the columns.
    """
    require_columns(section, dataset.column_names, task, where=what)
    if not len(dataset):
        raise DataError(f"{what}: no rows")
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


@dataclass(frozen=True)
class StoredImage:
    """An image in a cell of a table: the struct {bytes, path} of ``datasets``, or its bytes."""

    table: ImageTable
    row: int
    item: int | None  # in a cell that holds several
    root: Path  # folder that a path is relative to
    name: str

    def __str__(self) -> str:
        return self.name

    def read(self) -> Path | bytes:
        """Return the bytes in the cell, or the file it names."""
        cell = self.table.dataset[self.row].column(0)[0]
        value = (cell if self.item is None else cell[self.item]).as_py()
        data, path = (value.get("bytes"), value.get("path")) if isinstance(value, dict) else (value, None)
        if data is not None:
            return data
        if not path:
            raise RowError(f"{self.name}: the image is missing", reason="missing image")
        return self.root / path

    def key(self) -> str:
        """Return a key that changes when the table does, or the file that the cell names."""
        named = "".join(f"\0{file_key(path)}" for path in self._named())
        return f"{self.table.key}\0{self.row}\0{self.item}{named}"

    def files(self) -> tuple[Path, ...]:
        """Return the files of the table that may still change, and the one that the cell names."""
        return (*self.table.fresh, *self._named())

    def _named(self) -> tuple[Path, ...]:
        value = self.read() if self.table.names_files else b""
        return (value,) if isinstance(value, Path) else ()


class ImageTable:
    """One column of images on disk. It is pickled by its place, and opened once in a process.

    Args:
        dataset: a dataset with this one column, in Arrow's own format.
    """

    def __init__(self, dataset: Dataset):
        self.dataset = dataset
        _TABLES[self.key] = self

    @cached_property
    def key(self) -> str:
        """A key that changes when the files do, or their rows and columns."""
        files = [file_key(Path(file["filename"])) for file in self.dataset.cache_files]
        return "\0".join([self.dataset._fingerprint, *self.dataset.column_names, *files])

    @cached_property
    def fresh(self) -> tuple[Path, ...]:
        """Return the files of the table whose state said nothing when it was first asked for; see ``is_settled``."""
        files = [Path(file["filename"]) for file in self.dataset.cache_files]
        return tuple(path for path in files if not is_settled(path))

    @cached_property
    def names_files(self) -> bool:
        """Return whether a cell gives the path of an image and not its bytes."""
        chunks = (chunk for piece in self.dataset.iter(batch_size=1000) for chunk in piece.column(0).chunks)
        return any(_names_a_file(chunk) for chunk in chunks)

    @cached_property
    def pickled(self) -> bytes:
        """The data set by the places of its files; bytes only where it lies in memory."""
        return pickle.dumps(self.dataset)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, ImageTable) and self.key == other.key

    def __hash__(self) -> int:
        return hash(self.key)

    def __reduce__(self) -> Any:
        return _table, (self.key, self.pickled)


_TABLES: dict[str, ImageTable] = {}  # those opened in this process


def _table(key: str, pickled: bytes) -> ImageTable:
    return _TABLES.get(key) or ImageTable(pickle.loads(pickled))


def stored_images(
    dataset: Dataset, column: str, *, root: Path, place: Callable[[int], tuple[str, str]]
) -> Iterator[StoredImage | list[StoredImage] | None]:
    """Yield the images of each row in a column of images, without reading one."""
    import pyarrow as pa
    import pyarrow.compute as pc

    table = ImageTable(dataset.select_columns([column]).with_format("arrow"))
    row = 0
    for piece in table.dataset.iter(batch_size=1000):
        cells = piece.column(0)
        several = pa.types.is_list(cells.type) or pa.types.is_large_list(cells.type)
        lengths = pc.list_value_length(cells).to_pylist() if several else pc.is_valid(cells).to_pylist()
        for length in lengths:
            where = place(row)[1]
            if several and length is not None:
                yield [StoredImage(table, row, i, root, f"{where}, {column}[{i}]") for i in range(length)]
            else:
                yield StoredImage(table, row, None, root, f"{where}, {column}") if length else None
            row += 1


def _names_a_file(cells: Array) -> bool:
    """Return whether one of these cells holds no bytes and is not empty."""
    import pyarrow as pa

    while pa.types.is_list(cells.type) or pa.types.is_large_list(cells.type):
        cells = cells.flatten()
    if not pa.types.is_struct(cells.type):
        return False
    return "bytes" not in cells.type.names or cells.field("bytes").null_count > cells.null_count


def _shown(dataset: Dataset, column: str) -> Iterator[Any]:
    """Yield the value of each row in a column that it may lack; a value that is neither text nor number as its type."""
    import pyarrow as pa

    for piece in dataset.select_columns([column]).with_format("arrow").iter(batch_size=1000):
        cells = piece.column(0)
        kind = cells.type
        plain = pa.types.is_primitive(kind) or pa.types.is_string(kind) or pa.types.is_large_string(kind)
        several = pa.types.is_list(kind) or pa.types.is_large_list(kind)
        for cell in cells:
            if plain or not cell.is_valid:
                yield cell.as_py()
            else:  # media need not be decoded to be refused
                yield [] if several and not len(cell.values) else f"a value of type {kind}"


def _holds_images(dataset: Dataset, column: str | None) -> bool:
    """Return whether a column holds images themselves; a column of texts holds paths."""
    import pyarrow as pa

    if column not in dataset.column_names:
        return False
    kind = dataset.features.arrow_schema.field(column).type
    while pa.types.is_list(kind) or pa.types.is_large_list(kind):
        kind = kind.value_type
    return pa.types.is_struct(kind) or pa.types.is_binary(kind) or pa.types.is_large_binary(kind)


def _text_rows(dataset: Dataset, columns: list[str]) -> Iterator[dict[str, Any]]:
    """Yield the other columns of each row; a label stored as a number becomes its name."""
    labels = class_labels(dataset.features, columns)
    for row in dataset.select_columns(columns):
        named = {name: label.int2str(row[name]) for name, label in labels.items() if row[name] is not None}
        yield {**row, **named}


def class_labels(features: Features | None, columns: Collection[str]) -> dict[str, ClassLabel]:
    """Return those of ``columns`` that hold numbers of names; none where a table does not know its features."""
    from datasets import ClassLabel

    return {name: kind for name in columns if features and isinstance(kind := features[name], ClassLabel)}


def _first_line(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]
