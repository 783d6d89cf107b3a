"""The base class of all sections of a recipe, and the types of values that several sections use."""

import os
import re
from collections.abc import Iterator
from typing import Annotated, Any, get_args

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationInfo
from pydantic.fields import FieldInfo

from finetune.core.fields import Text
from finetune.errors import brief

PositiveInt = Annotated[int, Field(ge=1)]
Fraction = Annotated[float, Field(ge=0, le=1)]
# The seeds that numpy and torch accept, with room for the index of a process that is added.
Seed = Annotated[int, Field(ge=0, le=2**31 - 1)]

_VARIABLE = re.compile(r"\$\{([A-Za-z_][A-Za-z0-9_]*)\}")
_PLACE, _PROMPT = "a place", "a prompt"  # marks in annotations


def _put_in(value: Any, info: ValidationInfo) -> Any:
    """Return a text with each ``${NAME}`` replaced by its value; ``info.context`` collects the changed texts."""
    if not isinstance(value, str):
        return value
    if info.context is None:
        return _without_nul(value)
    if missing := [name for name in _VARIABLE.findall(value) if name not in os.environ]:
        raise ValueError(
            f"the environment variable {missing[0]} is not set. Set it, or set the value on the command line as "
            "KEY=VALUE"
        )
    text = _VARIABLE.sub(lambda match: os.environ[match[1]], value)
    if text != value:
        info.context.add(text)
    return _without_nul(text)


def _without_nul(path: str) -> str:
    if "\0" in path:
        raise ValueError(f"a path must not contain a NUL character, got {brief(path)}. Remove it")
    return path


# A path or a hub id. An environment variable (${NAME}) is replaced here, and nowhere else.
Place = Annotated[str, BeforeValidator(_put_in), _PLACE]
# A text that a model reads. ${NAME} is a text like any other here, and is not replaced.
Prompt = Annotated[Text, _PROMPT]


class Section(BaseModel):
    """Base of all sections: frozen, typed strictly, unknown keys refused.

    An editor shows the text under a field as its description. ``docs/recipe.md`` shows it too, with an example:
    the field's own, which a field needs if its type does not list its values.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, use_attribute_docstrings=True)


def stray_variables(value: Any, key: str = "") -> Iterator[tuple[str, str]]:
    """Yield the key and the text of each value of a section that still holds ``${NAME}``.

    Args:
        value: a section, or a value inside one.
        key: the dotted key of the value.
    """
    if isinstance(value, Section):
        fields = type(value).model_fields
        for name, part in value:
            if name not in fields or not {_PLACE, _PROMPT} & _marks(fields[name]):
                yield from stray_variables(part, f"{key}.{name}".lstrip("."))
    elif isinstance(value, dict):
        for name, part in value.items():
            yield from stray_variables(part, f"{key}.{name}")
    elif isinstance(value, list):
        for part in value:
            yield from stray_variables(part, key)
    elif isinstance(value, str) and _VARIABLE.search(value):
        yield key, value


def _marks(annotation: Any) -> set[str]:
    """Return the marks of a field, or of an annotation and its alternatives."""
    if isinstance(annotation, FieldInfo):
        return {mark for mark in annotation.metadata if isinstance(mark, str)} | _marks(annotation.annotation)
    own = {mark for mark in getattr(annotation, "__metadata__", ()) if isinstance(mark, str)}
    return own.union(*map(_marks, get_args(annotation)))


def takes_variables(field: FieldInfo) -> bool:
    """Return whether environment variables are replaced in the values of a field."""
    return _PLACE in _marks(field)
