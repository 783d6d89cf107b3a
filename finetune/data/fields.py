"""Examples from the fields of a row, whatever file the row came from."""

from __future__ import annotations

import re
import unicodedata
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any

from finetune.data.conversation import num_image_parts, read_conversation
from finetune.data.other_fields import FIELD_KEYS, check_other_fields
from finetune.data.turns import image_order, unsupervised_turns
from finetune.errors import DataError, RowError, brief, plain
from finetune.example import COLUMNS, Example, ImageHandle, answer, as_images, system, text_of
from finetune.lookup import did_you_mean

if TYPE_CHECKING:
    from collections.abc import Collection, Mapping
    from pathlib import Path

    from finetune.data.bad_rows import BadRows
    from finetune.example import ImageSource, Message
    from finetune.recipe import ColumnData, TaskSection


_URL = re.compile(r"(?:data:|[a-z][a-z0-9+.-]*://)", re.IGNORECASE)
_OTHERWISE = {
    "question": ", or say what to ask of rows without a question with data.default_question",
    "image": ', write "image": null in a row without an image, or set data.image=null where no row has one',
}
_BASE64 = re.compile(r"[A-Za-z0-9+/_=\s-]+")


@dataclass(frozen=True, kw_only=True)
class RawRow:
    """One row as its file has it."""

    id: str  # short, the same on every machine: file or split, and number
    where: str  # for errors: file and line
    fields: Mapping[str, Any]  # a field that is None is one the row does not have


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


def to_example(row: RawRow, section: ColumnData, task: TaskSection, *, root: Path, bad: BadRows) -> Example:
    """Make the example that a row is.

    Args:
        row: the row as its file has it.
        section: the section that names its fields.
        task: the section of the task that puts the questions.
        root: the folder that paths of images are relative to.
        bad: the record of the split's rows, which knows the ids of those before.

    Raises:
        RowError: naming row and field.
    """
    unread = check_other_fields(row.fields, section, task, where=row.where)
    fields = _Fields(row, section, root)
    bad.claim(fields.id, where=row.where)
    example = task.to_example(fields)
    if task.columns:  # they count as the row's own in every digest
        example = replace(example, meta=example.meta | {COLUMNS: {name: fields.own(name) for name in task.columns}})
    bad.unread.update(unread)
    return example


def _require_supervised(messages: list[Message], unsupervised: frozenset[int], *, last_only: bool, where: str) -> None:
    """Raise RowError where no turn would be supervised."""
    turns = sum(message["role"] == "assistant" for message in messages)
    if turns - 1 in unsupervised if last_only else len(unsupervised) == turns:
        which = "the last assistant turn, the only one that is supervised," if last_only else "every assistant turn"
        raise RowError(
            f"{where}: {which} has weight 0, loss false or train false, so nothing would be supervised. Leave the "
            "row out.",
            reason="nothing to supervise",
        )


def as_image(value: Any, root: Path, where: str) -> ImageSource:
    """Return the source of the image that a field holds: a path, or a place in a table."""
    if isinstance(value, ImageHandle):
        return value
    if value is None:
        raise RowError(f"{where}: the image is missing", reason="missing image")
    if not isinstance(value, str) or not value.strip():
        raise RowError(f"{where}: an image is the path of its file, not {brief(value, 80)}", reason="wrong type")
    if _URL.match(value):
        raise RowError(
            f"{where}: an image is the path of its file; {brief(value, 60)} is a URL. Save the image as a file beside "
            "the rows, or keep images in Parquet.",
            reason="image that is no path",
        )
    path = _file_of(root, value)
    if path is None:
        raise RowError(f"{where}: {_why_no_file(root / value, value)}", reason="missing image")
    return path


def _file_of(root: Path, value: str) -> Path | None:
    """Return the file of a path, also where they differ in how accents are written: in one character or in two."""
    for name in dict.fromkeys((value, unicodedata.normalize("NFC", value), unicodedata.normalize("NFD", value))):
        with suppress(OSError, ValueError):  # too long for a name, or with characters that none may have
            if (root / name).is_file():
                return root / name
    return None


def _why_no_file(path: Path, value: str) -> str:
    if len(value) > 255 and _BASE64.fullmatch(value):
        return (
            f"an image is the path of its file; {brief(value, 60)} looks like base64. Save the image as a file beside "
            "the rows, or keep images in Parquet"
        )
    with suppress(OSError, ValueError):
        if path.is_dir():
            return f"the image {plain(str(path))} does not exist: it is a folder"
    return f"the image {plain(str(path))} does not exist"


class _Fields:
    """The fields of a row under the names of the recipe; it is the ``finetune.recipe.row.Row`` that tasks read."""

    def __init__(self, row: RawRow, section: ColumnData, root: Path):
        self.row, self.section, self.root = row, section, root
        self.id = row.id if section.id is None else self._name("id")

    @cached_property
    def said(self) -> str:
        """The field that the row has: ``messages``, ``captions`` or ``answer``."""
        return self._one_of("messages", "captions", "answer")

    def question_and_answer(self, task: TaskSection) -> Example:
        """Return the example of a row that has ``captions`` or ``answer``."""
        sources = self.images()
        question = self.question() if task.has_question else ""
        texts = self._texts(self.said)
        return Example(
            id=self.id,
            messages=[*self._prompted(task, question, num_images=len(sources)), answer(task.text_of(texts[0]))],
            media=as_images(sources),
            answers=texts,
            captions=[task.text_of(text) for text in texts] if self.said == "captions" else [],
            meta={"kind": self._kind(question), "question": question},
        )

    def conversation(self, task: TaskSection) -> Example:
        """Return the example of a row that has ``messages``."""
        where = self.row.where
        raw = self._value("messages")
        messages, inside = read_conversation(raw, where=where)
        if messages[-1]["role"] != "assistant":
            fault = f"{where}: the conversation ends with the user; the last turn is the one to supervise"
            raise RowError(fault, reason="nothing to supervise")
        places = num_image_parts(messages)
        beside = self.images(needed=places > len(inside))
        if inside and beside:
            raise RowError(f"{where}: images stand both in the messages and beside them", reason="images twice")
        sources = beside or [as_image(value, self.root, where) for value in inside]
        if len(sources) != places:
            raise RowError(
                f'{where}: {len(sources)} images for {places} {{"type": "image"}} parts of the messages',
                reason="images and their places differ",
            )
        if (order := image_order(raw, where=where)) is not None:
            sources = [sources[index] for index in order]
        unsupervised = unsupervised_turns(raw, where=where)
        last_only = self.section.supervise == "last" or not task.has_question
        _require_supervised(messages, unsupervised, last_only=last_only, where=where)
        question = text_of(messages[-2]) if task.has_question else ""
        return Example(
            id=self.id,
            messages=task.converse(self._with_own_system(messages, task)),
            media=as_images(sources),
            answers=[text_of(messages[-1])],
            meta={"kind": self._kind(question), "question": question, "conversation": True},
            unsupervised=unsupervised,
        )

    def own(self, name: str) -> Any:
        """Return the value of a column of the task's own; None where the row has none."""
        return self.row.fields.get(name)

    def fault(self, key: str, what: str, *, reason: str) -> RowError:
        """Return the error that names file, line and column."""
        return RowError(f"{self.row.where}: {getattr(self.section, key, None) or key!r} {what}", reason=reason)

    def _value(self, key: str) -> Any:
        name = getattr(self.section, key)
        return None if name is None else self.row.fields.get(name)

    def _one_of(self, *keys: str) -> str:
        """Return the one of ``keys`` that the row has."""
        there = [key for key in keys if self._value(key) is not None]
        if len(there) > 1:
            names = " and ".join(repr(getattr(self.section, key)) for key in there)
            raise RowError(
                f"{self.row.where}: the row has {names}, and each would say what is supervised. Set all but one to "
                f"null, such as data.{there[0]}=null.",
                reason="two things to supervise",
            )
        if not there and self.section.answer is None:
            raise RowError(
                f"{self.row.where}: the row has none of what the recipe supervises", reason="nothing to supervise"
            )
        return there[0] if there else "answer"

    def _text(self, key: str) -> str:
        value = self._needed(key)
        if not isinstance(value, str):
            raise self._fault(key, f"must be a text that is not empty, not {brief(value, 80)}", "wrong type")
        if not value.strip():
            raise self._fault(key, f"must be a text that is not empty, not {brief(value, 80)}", f"empty {key}")
        return value

    def _name(self, key: str) -> str:
        """Return a text or a whole number as a text."""
        value = self._needed(key)
        return str(value) if isinstance(value, int) and not isinstance(value, bool) else self._text(key)

    def _texts(self, key: str) -> list[str]:
        value = self._needed(key)
        if isinstance(value, str) and key != "captions":
            return [self._text(key)]
        if not isinstance(value, list) or not all(isinstance(text, str) for text in value):
            raise self._fault(
                key, f"must be a text or a list of texts, none empty, not {brief(value, 80)}", "wrong type"
            )
        if not value or not all(text.strip() for text in value):
            raise self._fault(
                key, f"must be a text or a list of texts, none empty, not {brief(value, 80)}", f"empty {key}"
            )
        return value

    def question(self) -> str:
        """Return the question; the recipe's default question where the row has none."""
        if self.section.default_question is not None and self._value("question") is None:
            return self.section.default_question
        return self._text("question")

    def _system(self, task: TaskSection) -> Message | None:
        """Return the row's own system message; one that is empty is as if it were absent."""
        value = self._value("system")
        if value is None or value == "":
            return None
        if not task.has_question:
            raise self._fault("system", "is a system message, and a text beside an image has none", "wrong type")
        return system(self._text("system"))

    def _with_own_system(self, messages: list[Message], task: TaskSection) -> list[Message]:
        """Return a conversation with the row's own system message first, where it has one."""
        own = self._system(task)
        if own and messages[0]["role"] == "system":
            raise RowError(
                f"{self.row.where}: system messages stand both in the messages and under {self.section.system!r}. Keep "
                "one, or leave the second unread with data.system=null.",
                reason="system message twice",
            )
        return [own, *messages] if own else messages

    def _prompted(self, task: TaskSection, question: str, *, num_images: int) -> list[Message]:
        """Return the messages that put a question, with the row's own system message where it has one."""
        messages = task.ask(question, num_images=num_images)
        own = self._system(task)
        return [own, *(m for m in messages if m["role"] != "system")] if own else messages

    def _kind(self, question: str) -> str:
        return (question or "all") if self.section.kind is None else self._name("kind")

    def images(self, *, needed: bool = True) -> list[ImageSource]:
        """Return the sources of the row's images: those of ``images``, else the one of ``image``."""
        several = self._value("images")
        if several is not None:
            if not isinstance(several, list):
                raise self._fault("images", f"must be a list of images, not {brief(several, 80)}", "wrong type")
            return [as_image(value, self.root, self.row.where) for value in several]
        name = self.section.image
        absent = name is not None and name not in self.row.fields
        if name is None or (self._value("image") is None and not (needed and absent)):
            return []  # null says that there is none; a field that is absent may have another name
        return [as_image(self._needed("image"), self.root, self.row.where)]

    def _needed(self, key: str) -> Any:
        name = getattr(self.section, key)
        value = self._value(key)
        if value is None:
            if name is None:  # a question: nothing else is needed whose key is null
                raise DataError(f"{self.row.where}: data.{key} is null. Say what to ask with data.default_question.")
            if name in self.row.fields:
                raise self._fault(key, "must be a text that is not empty, not None", f"missing {key}")
            raise RowError(
                f"{self.row.where}: no field {name!r}; the row has {plain(', '.join(self.row.fields))}. Name the right "
                f"one with data.{key}=FIELD{_OTHERWISE.get(key, '')}.",
                reason=f"missing {key}",
            )
        return value

    def _fault(self, key: str, what: str, reason: str) -> RowError:
        return self.fault(key, what, reason=reason)
