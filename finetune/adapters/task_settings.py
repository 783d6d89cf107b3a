"""The settings of an adapter's task in its manifest, whether or not the plug-in of the task is installed."""

from typing import Any

from pydantic import ConfigDict, ValidationInfo

from finetune.core.fields import Word
from finetune.plugins import is_own
from finetune.recipe.chosen import Choice
from finetune.recipe.task import TaskSection

# Fields with a default in a recipe, which a manifest must state.
_NEEDED = {"answer_normalization", "question_template", "text_template", "max_new_tokens", "labels"}


class ForeignTask(TaskSection):
    """The settings of a task whose plug-in is not installed, kept unchanged until it is."""

    model_config = ConfigDict(extra="allow")

    architectures = frozenset()

    name: Word
    """The task."""


def parse_task(value: Any, info: ValidationInfo) -> Any:
    """Return the settings of a task as its section, for the validation of a manifest.

    Args:
        value: the parsed JSON; a value that is not an object is returned unchanged, and fails later.
        info: the context of the validation.

    Raises:
        ValueError: the settings lack a field, or break the section of the task.
    """
    if not isinstance(value, dict):
        return value
    name = value.get("name")
    if isinstance(name, str) and not is_own("tasks", name):
        try:
            return Choice("tasks").config(value).model_validate(value)
        except ValueError:  # not installed, or another version rejects the settings: ``require_usable`` reports which
            return ForeignTask.model_validate(value)
    config = Choice("tasks").config(value)
    if missing := sorted(_NEEDED & config.model_fields.keys() - value.keys()):
        raise ValueError(f"must have the field {missing[0]}")
    return config.model_validate(value, context=info.context)
