"""Rows that cannot be used: the first stops the run, or all are left out, counted and listed."""

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
        self.is_part = False  # of a mix, which decides by all rows together what holds for all
        self.tried = 0
        self.faults: dict[str, list[str]] = {}  # reason -> messages
        self.unread: Counter[str] = Counter()  # field that no key of the recipe names -> rows that have it
        self._places: dict[str, str] = {}  # id -> where its row stands

    @contextmanager
    def row(self) -> Iterator[None]:
        """Read one row inside the block; a RowError leaves the block early, and the row out."""
        self.tried += 1
        try:
            yield
        except RowError as error:
            self.note(error)

    def claim(self, row_id: str, *, where: str) -> None:
        """Raise RowError where another row has this id."""
        if row_id in self._places:
            fault = f"{where}: the id {row_id!r} is already that of {self._places[row_id]}"
            raise RowError(fault, reason="duplicate id")
        self._places[row_id] = where

    def note(self, error: RowError) -> None:
        """Raise or count a fault of a row that was tried."""
        if self.on_error == "error":
            raise error
        self.faults.setdefault(error.reason, []).append(str(error))

    @property
    def skipped(self) -> int:
        """The number of rows that were left out."""
        return sum(len(messages) for messages in self.faults.values())

    def conclude(self) -> None:
        """Log the rows that were left out.

        Raises:
            DataError: it is more than one row in twenty.
        """
        self.refuse_too_many()
        self.tell()

    def refuse_too_many(self) -> None:
        """Raise DataError where more than one row in twenty was left out."""
        if self.skipped > MAX_SHARE * self.tried:
            raise DataError(
                f"{self._report()}\nThat is more than {MAX_SHARE:.0%} of the rows: mend the data, or the names of its "
                "fields under data."
            )

    def tell(self) -> None:
        """Log which rows were left out and which fields are not read, if any."""
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
        rows_of: each field -> the number of rows that have it; 0 where that is not known.
    """
    listed = [f"{brief(name, 40)}{f' ({count} rows)' if count else ''}" for name, count in rows_of.items()]
    more = f" and {len(listed) - _LISTED} more" if len(listed) > _LISTED else ""
    return (
        f"fields that are not read: {', '.join(listed[:_LISTED])}{more}. They change nothing. Name a "
        "field under data to read it, or in data.ignore to leave it unlisted."
    )
