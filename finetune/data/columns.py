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

    Raises:
        DataError: with all columns there are.
    """
    there = f"The columns are {', '.join(columns)}."
    for key in FIELD_KEYS:
        name = getattr(section, key)
        if key in section.model_fields_set and name is not None and name not in columns:
            hint = did_you_mean(name, columns)
            raise DataError(f"{where}: data.{key} names {name!r}, which is no column.{hint} {there}")
    if strange := [name for name in section.ignore if name not in columns]:
        hint = did_you_mean(strange[0], columns)
        raise DataError(f"{where}: data.ignore names {strange[0]!r}, which is no column.{hint} {there}")
    if section.messages in columns:
        return
    if not {section.captions, section.answer, *task.columns} & set(columns):
        raise DataError(
            f"{where}: none of {section.messages!r}, {section.captions!r} and {section.answer!r} is a column, so "
            f"nothing says what is supervised. {there} Name the right one, such as data.answer=COLUMN."
        )
    if task.has_question and section.question not in columns and section.default_question is None:
        raise DataError(
            f"{where}: {section.question!r} is no column. {there} Name the right one with data.question=COLUMN, or say "
            "what to ask of every row with data.default_question."
        )
    if section.image is not None and not {section.image, section.images} & set(columns):
        raise DataError(
            f"{where}: {section.image!r} is no column. {there} Name the right one with data.image=COLUMN, or say that "
            "there are no images with data.image=null."
        )
