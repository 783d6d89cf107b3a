"""Examples from the fields of a row, for every source of rows."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any

from finetune.core.example import COLUMNS, Example, answer, as_images, system, text_of
from finetune.data.conversation import num_image_parts, read_conversation
from finetune.data.other_fields import check_other_fields
from finetune.data.row_images import as_image
from finetune.data.turns import image_order, unsupervised_turns
from finetune.errors import DataError, RowError, brief, plain

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from finetune.core.example import ImageSource, Message
    from finetune.data.bad_rows import BadRows
    from finetune.recipe import ColumnData, TaskSection


_OTHERWISE = {
    "question": ", or set the question of rows without one with data.default_question",
    "image": ', write "image": null in a row without an image, or set data.image=null if no row has one',
}


@dataclass(frozen=True, kw_only=True)
class RawRow:
    """One row as its file has it."""

    id: str  # short, and the same on every machine: file or split, and number
    where: str  # name of the row in errors: file and line
    fields: Mapping[str, Any]  # a field that is None counts as an absent one


def to_example(row: RawRow, section: ColumnData, task: TaskSection, *, root: Path, bad: BadRows) -> Example:
    """Make the example of a row.

    Args:
        row: the row as its file has it.
        section: the section that names the fields of rows.
        task: the section of the task that makes the prompts.
        root: the folder that paths of images are relative to.
        bad: the record of the split's rows, which has the ids of the rows before.

    Raises:
        RowError: if a field of the row cannot be used; the message names row and field.
    """
    unread = check_other_fields(row.fields, section, task, where=row.where)
    fields = _Fields(row, section, root)
    bad.claim(fields.id, where=row.where)
    example = task.to_example(fields)
    if task.columns:  # every digest of the row covers them
        example = replace(example, meta=example.meta | {COLUMNS: {name: fields.own(name) for name in task.columns}})
    bad.unread.update(unread)
    return example


def _require_supervised(messages: list[Message], unsupervised: frozenset[int], *, last_only: bool, where: str) -> None:
    """Raise RowError if no turn is supervised."""
    turns = sum(message["role"] == "assistant" for message in messages)
    if turns - 1 in unsupervised if last_only else len(unsupervised) == turns:
        which = "the last assistant turn, the only one that is supervised," if last_only else "every assistant turn"
        raise RowError(
            f"{where}: a row must have a supervised turn, but {which} has weight 0, loss false or train false. Leave "
            "the row out.",
            reason="nothing to supervise",
        )


class _Fields:
    """The fields of a row under the names of the recipe; it is the ``finetune.recipe.row.Row`` that tasks read."""

    def __init__(self, row: RawRow, section: ColumnData, root: Path):
        self.row, self.section, self.root = row, section, root
        self.id = row.id if section.id is None else self._name("id")

    @cached_property
    def supervised_field(self) -> str:
        """Return the field that the row has: ``messages``, ``captions`` or ``answer``."""
        return self._one_of("messages", "captions", "answer")

    def question_and_answer(self, task: TaskSection) -> Example:
        """Return the example of a row that has ``captions`` or ``answer``."""
        sources = self.images()
        question = self._question_for(task) if task.has_question else ""
        texts = self._texts(self.supervised_field)
        return Example(
            id=self.id,
            messages=[*self._prompted(task, question, num_images=len(sources)), answer(task.text_of(texts[0]))],
            media=as_images(sources),
            answers=texts,
            captions=[task.text_of(text) for text in texts] if self.supervised_field == "captions" else [],
            meta={"question_type": self._question_type(question), "question": question},
        )

    def conversation(self, task: TaskSection) -> Example:
        """Return the example of a row that has ``messages``."""
        where = self.row.where
        raw = self._value("messages")
        messages, inside = read_conversation(raw, where=where)
        if messages[-1]["role"] != "assistant":
            raise RowError(
                f"{where}: a conversation must end with a turn of the assistant, got {messages[-1]['role']} at its "
                "end. Add the answer, or leave the row out.",
                reason="nothing to supervise",
            )
        places = num_image_parts(messages)
        beside = self.images(needed=places > len(inside))
        if inside and beside:
            raise RowError(
                f"{where}: images must be in the messages or beside them, got both. Remove those of one place.",
                reason="images twice",
            )
        sources = beside or [as_image(value, self.root, where) for value in inside]
        if len(sources) != places:
            raise RowError(
                f'{where}: the messages must have one {{"type": "image"}} part for each image, got {places} parts for '
                f"{len(sources)} images. Add or remove parts.",
                reason="images and image parts differ",
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
            meta={"question_type": self._question_type(question), "question": question, "conversation": True},
            unsupervised=unsupervised,
        )

    def own(self, name: str) -> Any:
        """Return the value of a column that the task adds; None if the row does not have it."""
        return self.row.fields.get(name)

    def fault(self, key: str, what: str, *, reason: str) -> RowError:
        """Return the error that names file, line and column."""
        return RowError(f"{self.row.where}: {getattr(self.section, key, None) or key!r} {what}", reason=reason)

    def _value(self, key: str) -> Any:
        name = getattr(self.section, key)
        return None if name is None else self.row.fields.get(name)

    def _one_of(self, *keys: str) -> str:
        """Return the one key of ``keys`` that the row has."""
        there = [key for key in keys if self._value(key) is not None]
        if len(there) > 1:
            names = " and ".join(repr(getattr(self.section, key)) for key in there)
            raise RowError(
                f"{self.row.where}: a row must have one field to supervise, got {names}. Set all but one of the keys "
                f"to null, such as data.{there[0]}=null.",
                reason="several fields to supervise",
            )
        if not there and self.section.answer is None:
            names = " and ".join(repr(name) for key in keys if (name := getattr(self.section, key)) is not None)
            raise RowError(
                f"{self.row.where}: a row must have a field to supervise, got none of {names or 'those under data'}. "
                "Name the right one, such as data.answer=FIELD, or leave the row out.",
                reason="nothing to supervise",
            )
        return there[0] if there else "answer"

    def _text(self, key: str) -> str:
        value = self._needed(key)
        if not isinstance(value, str):
            raise self._fault(key, f"must be a non-empty text, got {brief(value, 80)}", "wrong type")
        if not value.strip():
            raise self._fault(key, f"must be a non-empty text, got {brief(value, 80)}", f"empty {key}")
        return value

    def _name(self, key: str) -> str:
        """Return a field that holds a text or a whole number as a text."""
        value = self._needed(key)
        return str(value) if isinstance(value, int) and not isinstance(value, bool) else self._text(key)

    def _texts(self, key: str) -> list[str]:
        value = self._needed(key)
        if isinstance(value, str) and key != "captions":
            return [self._text(key)]
        if not isinstance(value, list) or not all(isinstance(text, str) for text in value):
            raise self._fault(
                key, f"must be a non-empty text or a list of non-empty texts, got {brief(value, 80)}", "wrong type"
            )
        if not value or not all(text.strip() for text in value):
            raise self._fault(
                key, f"must be a non-empty text or a list of non-empty texts, got {brief(value, 80)}", f"empty {key}"
            )
        return value

    def question(self) -> str:
        """Return the question of the row; the recipe's default question if the row has none."""
        if self.section.default_question is not None and self._value("question") is None:
            return self.section.default_question
        return self._text("question")

    def _question_for(self, task: TaskSection) -> str:
        """Return the question of the row; the recipe's default question, or that of its task, if the row has none."""
        if task.own_question is not None and self.section.default_question is None and self._value("question") is None:
            return task.own_question
        return self.question()

    def _system(self, task: TaskSection) -> Message | None:
        """Return the row's own system message; an empty message counts as an absent one."""
        value = self._value("system")
        if value is None or value == "":
            return None
        if not task.has_question:
            raise self._fault(
                "system",
                f"must be null for this task, whose texts have no system message, got {brief(value, 80)}. Ignore the "
                "field with data.system=null.",
                "wrong type",
            )
        return system(self._text("system"))

    def _with_own_system(self, messages: list[Message], task: TaskSection) -> list[Message]:
        """Return a conversation with the row's own system message first, if the row has one."""
        own = self._system(task)
        if own and messages[0]["role"] == "system":
            raise RowError(
                f"{self.row.where}: a row must have at most one system message, got one in the messages and one under "
                f"{self.section.system!r}. Keep one, or ignore the second with data.system=null.",
                reason="system message twice",
            )
        return [own, *messages] if own else messages

    def _prompted(self, task: TaskSection, question: str, *, num_images: int) -> list[Message]:
        """Return the messages of a question, with the row's own system message if the row has one."""
        messages = task.ask(question, num_images=num_images)
        own = self._system(task)
        return [own, *(m for m in messages if m["role"] != "system")] if own else messages

    def _question_type(self, question: str) -> str:
        return (question or "all") if self.section.question_type is None else self._name("question_type")

    def images(self, *, needed: bool = True) -> list[ImageSource]:
        """Return the sources of the row's images: those of ``images`` if the row has it, or the one of ``image``."""
        several = self._value("images")
        if several is not None:
            if not isinstance(several, list):
                raise self._fault("images", f"must be a list of images, got {brief(several, 80)}", "wrong type")
            return [as_image(value, self.root, self.row.where) for value in several]
        name = self.section.image
        absent = name is not None and name not in self.row.fields
        if name is None or (self._value("image") is None and not (needed and absent)):
            return []  # null means that the row has no image; an absent field may have another name
        return [as_image(self._needed("image"), self.root, self.row.where)]

    def _needed(self, key: str) -> Any:
        name = getattr(self.section, key)
        value = self._value(key)
        if value is None:
            if name is None:  # the key of a question; no other key that is null gets here
                raise DataError(
                    f"{self.row.where}: data.{key} must name a field, got null. Name it, or set one question for every "
                    "row with data.default_question."
                )
            if name in self.row.fields:
                raise self._fault(key, "must be a non-empty text, got null", f"missing {key}")
            raise RowError(
                f"{self.row.where}: a row must have the field {name!r}, got {plain(', '.join(self.row.fields))}. Name "
                f"the right one with data.{key}=FIELD{_OTHERWISE.get(key, '')}.",
                reason=f"missing {key}",
            )
        return value

    def _fault(self, key: str, what: str, reason: str) -> RowError:
        return self.fault(key, what, reason=reason)
