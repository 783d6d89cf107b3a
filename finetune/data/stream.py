"""Streamed rows of a source that is too large to keep: the run reads them in a seeded order, by position.

::

    position   0 ... L-1 | L ... 2L-1 | ...      L rows are a pass; each pass has an order of its own
    checked    the first 1,000 before step 1, every other on arrival

One process reads a stream forward, once, and hands the rows on; the process that collates a row checks it first. The
order does not depend on where a reader begins, so a resumed run gets the same rows. To resume, the reader reads the
first pass again: up to the position, or to its end, which gives the length of a pass.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np

from finetune.core.example import ImageOptions
from finetune.data.arrow import class_labels
from finetune.data.bad_rows import BadRows, unread_report
from finetune.data.bit_depth import COLORS, VALUES, decide_range, fixed_range
from finetune.data.columns import require_columns
from finetune.data.fields import to_example
from finetune.data.image_checks import facts_of, look
from finetune.data.other_fields import read_fields, refused_columns, unread_columns
from finetune.data.stream_reader import Reader
from finetune.data.survey import Survey, system_of
from finetune.errors import DataError, RowError, brief
from finetune.recipe import QuestionSection

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    from datasets import IterableDataset

    from finetune.core.example import Example
    from finetune.data.stream_reader import Arrival
    from finetune.interfaces import RowLengths
    from finetune.recipe import ColumnData, TaskSection

SAMPLE = 1000  # rows checked before the first step
BUFFER = 1000  # rows that the shuffle chooses among
_AT_ONCE = 100  # rows in one table
_SHOWN = 3  # rows kept to be shown
_TOO_LONG = "too long"
_LISTED = 20  # rows named in a report


@dataclass(frozen=True, kw_only=True)
class Checks:
    """The checks that turn arriving rows into examples; every process can run them."""

    section: ColumnData
    task: TaskSection
    root: Path  # folder that paths of images are relative to
    seed: int  # seed of the choice among captions
    lengths: RowLengths | None = None  # counter of the base that the rows are for
    limit: int | None = None  # largest number of tokens of a row
    system: tuple[str | None] | None = None  # the system message that every row must have, if the first rows agree

    def example(self, arrival: Arrival) -> Example | DataError:
        """Return the row as an example, or the error that refuses it.

        The checks are those of rows of a list, except that the ids of other rows are not known here.
        """
        alone = BadRows("", on_error="error", log=print)
        try:
            example = to_example(arrival.row, self.section, self.task, root=self.root, bad=alone)
            pixels, page = self.section.max_image_pixels, self.section.image_page
            seen = [look(source, max_pixels=pixels, page=page) for source in example.images]
            if self.lengths is not None:
                tokens = self.lengths.of_training_row(example, [one.size for one in seen])
                if self.limit is not None and tokens.row > self.limit:
                    fault = f"{arrival.row.where}: a row must have at most {self.limit} tokens, got {tokens.row}"
                    raise RowError(fault, reason=_TOO_LONG)
                example = replace(example, num_tokens=tokens.row, num_answer_tokens=tokens.answer)
            if self.system is not None and system_of(example) != self.system[0]:
                raise RowError(
                    f"{arrival.row.where}: the system message must equal that of the first rows, "
                    f"{brief(self.system[0])}, got {brief(system_of(example))}. Set task.system_prompt to the message "
                    "that ask() must send.",
                    reason="another system message",
                )
        except DataError as error:
            return error
        options = ImageOptions(range=fixed_range(self.section), page=self.section.image_page)
        example = replace(example, meta=example.meta | facts_of(seen), image_options=options)
        return example.in_epoch(arrival.epoch, seed=self.seed)


class Stream:
    """The rows of one split, in order and without end.

    Args:
        dataset: the streaming dataset.
        what: the name of the rows in errors.
        files: the name and version of each file, or other facts that change with the dataset.
        checks: the checks of rows that arrive.
        bad: the record of the rows that cannot be used.

    Attributes:
        first: the first rows that can be trained on.
        survey: the survey of the rows that were checked before the first step.
        seen: the number of rows that the run has taken, over all processes.

    Raises:
        DataError: if the dataset cannot be read, a column is missing, or one of its first rows cannot be used.
    """

    def __init__(
        self, dataset: IterableDataset, what: str, *, files: list[tuple[str, ...]], checks: Checks, bad: BadRows
    ):
        self.dataset, self.what, self.files, self.checks, self.bad = dataset, what, files, checks, bad
        self.first: list[Example] = []
        self.survey = Survey(is_whole=False)
        self.seen = 0
        self.length: int | None = None  # rows of a pass, known once one was read to its end
        self._long: list[str] = []
        self._until = 0  # the positions before this one are counted
        columns = dataset.column_names or list(next(iter(dataset.take(1)), {}))  # JSON has them in its rows only
        require_columns(checks.section, columns, checks.task, where=what)
        self.columns = [name for name in read_fields(checks.section, checks.task) if name in columns]
        self.columns += refused_columns(checks.section, checks.task, columns)
        if unread := unread_columns(checks.section, checks.task, columns):
            bad.log(f"{what}: {unread_report(dict.fromkeys(unread, 0))}")
        self._check_sample()

    def keep_prompt(self, task: TaskSection) -> None:
        """Make the prompts of all later rows as those of the first rows.

        Args:
            task: the section of the task, with the settings that the first rows decided.
        """
        agreed = isinstance(self.checks.task, QuestionSection) and self.checks.task.system_prompt is None
        system = (getattr(task, "system_prompt", None),) if agreed else None
        self.checks = replace(self.checks, task=task, system=system)

    @property
    def identity(self) -> dict[str, Any]:
        """Return the files of the stream and the order of its rows, which identify rows that were not all read."""
        from datasets import __version__

        order = {"seed": self.checks.seed, "buffer": BUFFER, "datasets": __version__}
        return {"files": [list(file) for file in self.files], **order}

    def reader(self) -> Reader:
        """Return a reader that has not begun."""
        labels = class_labels(self.dataset.features, self.columns)
        return Reader(self.checks.section, labels, self.passes, what=self.what)

    def receive(self, arrived: list[tuple[int, DataError | None]]) -> None:
        """Count rows that were checked.

        Args:
            arrived: the position of each row, with the error that refuses the row or None.

        Raises:
            DataError: if a row cannot be used; with ``data.on_error: skip``, if more than one row in twenty cannot.
        """
        for position, error in arrived:
            if position < self._until:  # a row of the sample, or one that is taken again after memory ran out
                continue
            self._until = position + 1
            self._count(error)
            if self._long and self.checks.section.too_long == "error":
                raise DataError(f"{self._long[0]}. {_WAYS_OUT}")
        self.bad.refuse_too_many()

    def log_skipped(self, log: Callable[[str], None]) -> None:
        """Log the rows that were left out."""
        self.bad.log = log
        self.bad.log_skipped()
        if self._long:
            log(f"{self._report_long(self.bad.tried)}They are left out (data.too_long: drop).")

    def passes(self, first: int) -> Iterator[tuple[int, int, int, Any]]:
        """Yield (epoch, position of its first row, position of the table's first row, Arrow table) without end.

        Args:
            first: the first position that is needed; whole passes before it are skipped if their length is known.

        Raises:
            DataError: if reading fails, or the stream has no rows.
        """
        import pyarrow
        from datasets.exceptions import DatasetsError

        epoch = begin = 0
        while True:
            if self.length:
                epoch = max(epoch, first // self.length)
                begin = epoch * self.length
            start = begin
            order = np.random.default_rng([self.checks.seed, epoch])
            # One file at a time, in a shuffled order. datasets reads several files by threads: forked workers do not
            # survive beside these, and datasets waits ten seconds for them at the end.
            mixed = self.dataset.select_columns(self.columns).shuffle(
                generator=order, buffer_size=BUFFER, max_buffer_input_shards=1
            )
            try:
                for table in mixed.with_format("arrow").iter(batch_size=_AT_ONCE):
                    yield epoch, begin, start, table
                    start += table.num_rows
            except (OSError, ValueError, pyarrow.ArrowException, DatasetsError) as error:
                cause = (str(error).strip() or type(error).__name__).splitlines()[0]
                raise DataError(
                    f"{self.what}: the stream must be readable to its end, but reading failed at row {start}: "
                    f"{cause.rstrip('.')}. Check the source, and start the run again."
                ) from error
            if start == begin:
                raise DataError(f"{self.what}: the stream must have at least one row, got none. Check data.train.")
            self.length = start - begin
            epoch, begin = epoch + 1, start

    def _check_sample(self) -> None:
        reader = self.reader()
        deep: list[Example] = []
        for position in range(SAMPLE):
            arrival = reader.at(position)
            if arrival.epoch:  # the stream is shorter than the sample
                break
            found = self.checks.example(arrival)
            self._count(found if isinstance(found, DataError) else None)
            if not isinstance(found, DataError):
                self.survey.add(found)
                deep += [found] if {VALUES, COLORS} & found.meta.keys() else []
                if len(self.first) < _SHOWN:
                    self.first.append(found)
            self._until = position + 1
        if self._long and self.checks.section.too_long == "error":
            raise DataError(f"{self._report_long(self._until)}{_WAYS_OUT}")
        self.bad.refuse_too_many()
        if not self.first:
            raise DataError(
                f"{self._report_long(self._until)}No row is left. Shorten the rows, or raise data.max_length."
            )
        self._decide_range(deep)
        left = self.bad.skipped + len(self._long)
        self.bad.log(
            f"{self.what} is a stream: its first {self._until} rows were checked, {left} of them left out; the others "
            "are checked as they arrive"
        )

    def _decide_range(self, deep: list[Example]) -> None:
        """Decide from the first rows how the images of all rows are scaled."""
        section = self.checks.section
        found = decide_range(section, deep, what="train", log=self.bad.log)
        if section.image_range == "auto" and found:
            section = section.model_copy(update={"image_range": list(found)})
            self.checks = replace(self.checks, section=section)
            options = ImageOptions(range=found, page=section.image_page)
            self.first = [replace(example, image_options=options) for example in self.first]

    def _count(self, error: DataError | None) -> None:
        self.bad.tried += 1
        if isinstance(error, RowError) and error.reason == _TOO_LONG:
            self._long.append(str(error))
        elif isinstance(error, RowError):
            self.bad.note(error)
        elif error is not None:
            raise error

    def _report_long(self, rows: int) -> str:
        listed = "".join(f"\n  {fault}" for fault in self._long[:_LISTED])
        more = f"\n  and {len(self._long) - _LISTED} more" if len(self._long) > _LISTED else ""
        return f"{len(self._long)} of {rows} rows are too long:{listed}{more}\n"


_WAYS_OUT = (
    "A row is never cut. Shorten such rows, make their images smaller, raise data.max_length where the base takes "
    "more, or leave them out with data.too_long=drop."
)


Rows: TypeAlias = "list[Example] | Stream"  # the rows that a run trains on
