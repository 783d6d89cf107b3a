"""Reading single rows of a stream, each by its position."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field
from itertools import islice
from typing import TYPE_CHECKING, Any

from finetune.data.fields import RawRow

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping

    from datasets import ClassLabel

    from finetune.recipe import ColumnData


@dataclass(frozen=True, kw_only=True)
class Arrival:
    """One row as it was read, before any check."""

    position: int
    epoch: int  # the pass, from 0
    row: RawRow


@dataclass(frozen=True)
class ArrivedImage:
    """An image that came with its row."""

    data: bytes = field(repr=False)
    name: str

    def __str__(self) -> str:
        return self.name

    def read(self) -> bytes:
        """Return the bytes of the image's file."""
        return self.data

    def key(self) -> str:
        """Return a key that changes when the image does."""
        return hashlib.sha256(self.data).hexdigest()

    def files(self) -> tuple[()]:
        """Return no file, because the key is made of the bytes."""
        return ()


class Reader:
    """A reader that goes forward through a stream, and skips the rows between the positions that are read.

    Args:
        section: the section of the recipe that names the columns of images.
        labels: the class labels by column.
        passes: the function that yields the tables of the stream from a position on, as ``Stream.passes`` does.
        what: the name of the stream in messages.
    """

    def __init__(
        self,
        section: ColumnData,
        labels: Mapping[str, ClassLabel],
        passes: Callable[[int], Iterator[tuple[int, int, int, Any]]],
        *,
        what: str,
    ):
        self._section, self._labels, self._passes, self._what = section, labels, passes, what
        self._tables: Iterator[tuple[int, int, int, Any]] | None = None
        self._end = 0

    def at(self, position: int) -> Arrival:
        """Return the row at ``position``, which must be larger than that of the call before."""
        if self._tables is None:
            self._tables = self._passes(position)
        while position >= self._end:
            self._epoch, self._begin, self._start, self._table = next(self._tables)
            self._end = self._start + self._table.num_rows
        (fields,) = self._table.slice(position - self._start, 1).to_pylist()
        number = position - self._begin
        section = self._section
        for name, label in self._labels.items():
            if fields[name] is not None:
                fields[name] = label.int2str(fields[name])
        images = [name for name in (section.image, section.images) if name and name in fields]
        texts = {name: value for name, value in fields.items() if name not in images}
        where = f"{self._what}, row {number} of pass {self._epoch + 1} of the stream ({_brief(texts)})"
        for name in images:
            fields[name] = _image(fields[name], f"{where}, {name}")
        row = RawRow(id=f"stream:{self._epoch + 1}:{number}", where=where, fields=fields)
        return Arrival(position=position, epoch=self._epoch, row=row)


def _image(value: Any, name: str) -> Any:
    """Return the content of a cell of images: images, paths, or a value that the check of fields refuses later."""
    if isinstance(value, list):
        return [_image(item, f"{name}[{i}]") for i, item in enumerate(value)]
    if isinstance(value, dict):
        value = value.get("bytes") or value.get("path")
    return ArrivedImage(value, name) if isinstance(value, bytes) else value


def _brief(fields: Mapping[str, Any]) -> str:
    """Return the texts of a row, shortened: a shuffled stream has no row numbers by which to find the row."""
    return ", ".join(f"{name}: {value!r:.40}" for name, value in islice(fields.items(), 4))
