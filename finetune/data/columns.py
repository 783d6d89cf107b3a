"""The columns of a table, checked before any of its rows is read."""

from __future__ import annotations

from typing import TYPE_CHECKING

from finetune.data.other_fields import FIELD_KEYS
from finetune.errors import DataError
from finetune.lookup import did_you_mean

if TYPE_CHECKING:
    from collections.abc import Collection

    from finetune.recipe import ColumnData, TaskSection


def require_columns(section: ColumnData, columns: Collection[str], task: TaskSection, *, where: str) -> None:
    """Check, before any row is read, that a table has the columns that the recipe names and a row needs.

    Args:
        section: the section that names the fields of rows.
        columns: the names of the table's columns.
        task: the section of the task, which may need a question and columns of its own.
        where: the name of the table in errors.

    Raises:
        DataError: if a column is missing; the message lists all columns of the table.
    """
    there = f"The columns are {', '.join(columns)}."
    for key in FIELD_KEYS:
        name = getattr(section, key)
        if key in section.model_fields_set and name is not None and name not in columns:
            hint = did_you_mean(name, columns)
            raise DataError(f"{where}: data.{key} must name a column, got {name!r}.{hint} {there}")
    if strange := [name for name in section.ignore if name not in columns]:
        hint = did_you_mean(strange[0], columns)
        raise DataError(f"{where}: data.ignore must name columns, got {strange[0]!r}.{hint} {there}")
    if section.messages in columns:
        return
    if not {section.captions, section.answer, *task.columns} & set(columns):
        raise DataError(
            f"{where}: the table must have a column to supervise, got none of {section.messages!r}, "
            f"{section.captions!r} and {section.answer!r}. {there} Name the right one, such as data.answer=COLUMN."
        )
    needs_question = task.has_question and task.own_question is None and section.default_question is None
    if needs_question and section.question not in columns:
        raise DataError(
            f"{where}: the table must have the question column {section.question!r}, got none. {there} Name the right "
            "one with data.question=COLUMN, or set one question for every row with data.default_question."
        )
    if section.image is not None and not {section.image, section.images} & set(columns):
        raise DataError(
            f"{where}: the table must have the image column {section.image!r}, got none. {there} Name the right one "
            "with data.image=COLUMN, or set data.image=null if no row has an image."
        )
