"""Fields of a row that the recipe does not name: a field that would change the row is an error, others are listed."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from finetune.errors import RowError, brief

if TYPE_CHECKING:
    from collections.abc import Collection, Mapping

    from finetune.recipe import ColumnData, TaskSection

FIELD_KEYS = ("image", "images", "question", "answer", "captions", "messages", "system", "question_type", "id")

_TURNS = "write the whole conversation under messages"
_MEDIA = "only images are read"
_PAIRS = "a row has one supervised answer; preferences are not trained"
_TOOLS = "tools are not rendered into the prompt"
# Other trainers read fields of these names (LLaMA-Factory, ShareGPT, TRL, Axolotl, ms-swift). Without such a field the
# row would have another meaning.
REFUSED = {
    "history": _TURNS,
    "conversations": f"{_TURNS} with role and content, or name the field with data.messages",
    "instruction": "join it to the question, or name the field with data.question",
    "input": "join it to the question, or name the field with data.question",
    "tools": _TOOLS,
    "functions": _TOOLS,
    "chat_template_kwargs": "rows pass no arguments to the chat template",
    "documents": "documents are not rendered into the prompt; put their text into the question",
    "video": _MEDIA,
    "videos": _MEDIA,
    "audio": _MEDIA,
    "audios": _MEDIA,
    "chosen": _PAIRS,
    "rejected": _PAIRS,
    "rejected_response": _PAIRS,
    "rejected_messages": _PAIRS,
    "rejected_images": _PAIRS,
    "kto_tag": _PAIRS,
    "loss_scale": "tokens have no weights of their own",
    # These three are refused for a whole row; a turn may have them.
    "weight": "rows have no weights: leave the row out, or set the weights of a mix's sources",
    "loss": "leave the row out, or set loss on its turns",
    "train": "leave the row out, or set train on its turns",
}
_NEUTRAL: dict[str, tuple[Any, ...]] = {"weight": (1,), "loss": (1,), "train": (1,)}


def read_fields(section: ColumnData, task: TaskSection) -> list[str]:
    """Return the fields that are read: those that the recipe names, and those that its task adds."""
    named = [name for key in FIELD_KEYS if (name := getattr(section, key)) is not None]
    return list(dict.fromkeys([*named, *task.columns]))


def refused_columns(section: ColumnData, task: TaskSection, columns: Collection[str]) -> list[str]:
    """Return the columns of a table whose values must be checked, because a row may not use them."""
    named = {*read_fields(section, task), *section.ignore}
    return [name for name in columns if name in REFUSED and name not in named]


def unread_columns(section: ColumnData, task: TaskSection, columns: Collection[str]) -> list[str]:
    """Return the columns of a table that are not read."""
    named = {*read_fields(section, task), *section.ignore}
    return [name for name in columns if name not in REFUSED and name not in named]


def check_other_fields(fields: Mapping[str, Any], section: ColumnData, task: TaskSection, *, where: str) -> list[str]:
    """Check the fields that the recipe does not name; an empty field counts as an absent one.

    Args:
        fields: the fields of the row.
        section: the section that names the fields of rows.
        task: the section of the task, which may read fields of its own.
        where: the name of the row in errors.

    Returns:
        The names of the fields that are not read.

    Raises:
        RowError: if a field that is not supported would change the meaning of the row.
    """
    named = {*read_fields(section, task), *section.ignore}
    unread = []
    for name, value in fields.items():
        if name in named or is_empty(value):
            continue
        if name not in REFUSED:
            unread.append(name)
        elif value not in _NEUTRAL.get(name, ()):
            raise RowError(
                f"{where}: the field {name!r} is not supported, got {brief(value, 60)}: {REFUSED[name]}. Remove the "
                f"field from the rows, or ignore it with data.ignore=[{name}].",
                reason="unsupported field",
            )
    return unread


def is_empty(value: Any) -> bool:
    """Return whether a field is empty, which counts as absent: a table has every column in every row."""
    return value is None or (isinstance(value, str | list | dict) and not value)
