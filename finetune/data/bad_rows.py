"""Rows that cannot be used: the first one stops the run, or the run leaves out all of them, and lists them."""

from __future__ import annotations

from collections import Counter
from contextlib import contextmanager
from typing import TYPE_CHECKING, Literal

from finetune.core.outside_text import safe_line
from finetune.errors import DataError, RowError, brief

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping

MAX_SHARE = 0.05  # of a split that may be left out
_LISTED = 20  # rows named for each reason


class BadRows:
    """A record of the rows of one split that cannot be used.

    Args:
        what: the name of the rows, such as ``train``.
        on_error: ``error`` raises the first fault; ``skip`` counts faults by reason.
        log: the function that is called with the report at the end.
    """

    def __init__(self, what: str, *, on_error: Literal["error", "skip"], log: Callable[[str], None]):
        self.what, self.on_error, self.log = what, on_error, log
        self.is_part = False  # True for one source of a mix: the mix decides for the rows of all its sources
        self.tried = 0
        self.faults: dict[str, list[str]] = {}  # reason -> messages
        self.unread: Counter[str] = Counter()  # field that no key of the recipe names -> rows that have it
        self._places: dict[str, str] = {}  # id -> place of its row

    @contextmanager
    def row(self) -> Iterator[None]:
        """Read one row inside the block; a RowError ends the block and leaves the row out."""
        self.tried += 1
        try:
            yield
        except RowError as error:
            self.note(error)

    def claim(self, row_id: str, *, where: str) -> None:
        """Raise RowError if another row has this id."""
        if row_id in self._places:
            raise RowError(
                f"{where}: the id of a row must be unique, but {row_id!r} is given twice, first in "
                f"{self._places[row_id]}. Change one of them.",
                reason="duplicate id",
            )
        self._places[row_id] = where

    def note(self, error: RowError) -> None:
        """Raise the error of a row, or count it with ``on_error: skip``."""
        if self.on_error == "error":
            raise error
        self.faults.setdefault(error.reason, []).append(str(error))

    @property
    def skipped(self) -> int:
        """Return the number of rows that were left out."""
        return sum(len(messages) for messages in self.faults.values())

    def conclude(self) -> None:
        """Log the rows that were left out.

        Raises:
            DataError: if more than one row in twenty was left out.
        """
        self.refuse_too_many()
        self.log_skipped()

    def refuse_too_many(self) -> None:
        """Raise DataError if more than one row in twenty was left out."""
        if self.skipped > MAX_SHARE * self.tried:
            raise DataError(
                f"{self._report()}\nA run may skip at most {MAX_SHARE:.0%} of the rows, and these are more. Correct "
                "the rows, or the names of the fields under data."
            )

    def log_skipped(self) -> None:
        """Log the rows that were left out and the fields that are not read, if there are any."""
        if self.unread:
            self.log(f"{self.what} rows: {unread_report(self.unread)}")
        if self.skipped:
            self.log(self._report())

    def _report(self) -> str:
        lines = [f"skipped {self.skipped} of {self.tried} {self.what} rows (data.on_error: skip)"]
        for reason, messages in sorted(self.faults.items(), key=lambda item: -len(item[1])):
            lines += [f"  {reason}: {len(messages)}", *(f"    {safe_line(message)}" for message in messages[:_LISTED])]
            if len(messages) > _LISTED:
                lines.append(f"    and {len(messages) - _LISTED} more")
        return "\n".join(lines)


def unread_report(rows_of: Mapping[str, int]) -> str:
    """Return the sentence that lists fields which are not read.

    Args:
        rows_of: each field -> the number of rows that have it; 0 if the number is not known.
    """
    listed = [f"{brief(name, 40)}{f' ({count} rows)' if count else ''}" for name, count in rows_of.items()]
    more = f" and {len(listed) - _LISTED} more" if len(listed) > _LISTED else ""
    return (
        f"fields that are not read: {', '.join(listed[:_LISTED])}{more}. They change nothing. To read a field, name "
        "it under data; to remove it from this list, add it to data.ignore."
    )
