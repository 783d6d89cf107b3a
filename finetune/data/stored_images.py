"""Images in a column of a table: they stay on disk until they are opened."""

from __future__ import annotations

import pickle
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from finetune.core.file_state import file_key, is_settled
from finetune.errors import RowError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from datasets import Dataset
    from pyarrow import Array


@dataclass(frozen=True)
class StoredImage:
    """An image in a cell of a table; the cell holds the struct {bytes, path} of ``datasets``, or bytes."""

    table: ImageTable
    row: int
    item: int | None  # number of the image in a cell with several; None in a cell with one
    root: Path  # folder that the path in a cell is relative to
    name: str

    def __str__(self) -> str:
        return self.name

    def read(self) -> Path | bytes:
        """Return the bytes in the cell, or the path of the file that it names.

        Raises:
            RowError: if the cell has neither.
        """
        cell = self.table.dataset[self.row].column(0)[0]
        value = (cell if self.item is None else cell[self.item]).as_py()
        data, path = (value.get("bytes"), value.get("path")) if isinstance(value, dict) else (value, None)
        if data is not None:
            return data
        if not path:
            raise RowError(
                f"{self.name}: an image must have bytes or a path, got neither. Leave the row out.",
                reason="missing image",
            )
        return self.root / path

    def key(self) -> str:
        """Return a key that changes with the table, and with the file that the cell names."""
        named = "".join(f"\0{file_key(path)}" for path in self._named())
        return f"{self.table.key}\0{self.row}\0{self.item}{named}"

    def files(self) -> tuple[Path, ...]:
        """Return the files of the table that may still change, and the file that the cell names."""
        return (*self.table.fresh, *self._named())

    def _named(self) -> tuple[Path, ...]:
        value = self.read() if self.table.names_files else b""
        return (value,) if isinstance(value, Path) else ()


class ImageTable:
    """One column of images on disk; a pickle holds its place, and a process opens it once.

    Args:
        dataset: a dataset with this one column, in Arrow's own format.
    """

    def __init__(self, dataset: Dataset):
        self.dataset = dataset
        _TABLES[self.key] = self

    @cached_property
    def key(self) -> str:
        """Return a key that changes with the files, and with the rows and columns taken from them."""
        files = [file_key(Path(file["filename"])) for file in self.dataset.cache_files]
        return "\0".join([self.dataset._fingerprint, *self.dataset.column_names, *files])

    @cached_property
    def fresh(self) -> tuple[Path, ...]:
        """Return the files of the table that were not settled at the first call; see ``is_settled``."""
        files = [Path(file["filename"]) for file in self.dataset.cache_files]
        return tuple(path for path in files if not is_settled(path))

    @cached_property
    def names_files(self) -> bool:
        """Return whether any cell gives the path of an image and not its bytes."""
        chunks = (chunk for piece in self.dataset.iter(batch_size=1000) for chunk in piece.column(0).chunks)
        return any(_names_a_file(chunk) for chunk in chunks)

    @cached_property
    def pickled(self) -> bytes:
        """Return the pickled data set: the places of its files, or its bytes if it is in memory."""
        return pickle.dumps(self.dataset)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, ImageTable) and self.key == other.key

    def __hash__(self) -> int:
        return hash(self.key)

    def __reduce__(self) -> Any:
        return _table, (self.key, self.pickled)


_TABLES: dict[str, ImageTable] = {}  # key -> table that this process has opened


def _table(key: str, pickled: bytes) -> ImageTable:
    return _TABLES.get(key) or ImageTable(pickle.loads(pickled))


def stored_images(
    dataset: Dataset, column: str, *, root: Path, place: Callable[[int], tuple[str, str]]
) -> Iterator[StoredImage | list[StoredImage] | None]:
    """Yield the images of each row in a column of images, without reading any."""
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
    """Return whether any of the cells is not empty but holds no bytes."""
    import pyarrow as pa

    while pa.types.is_list(cells.type) or pa.types.is_large_list(cells.type):
        cells = cells.flatten()
    if not pa.types.is_struct(cells.type):
        return False
    return "bytes" not in cells.type.names or cells.field("bytes").null_count > cells.null_count
