"""The base class of all sections of a recipe, and the types of values that several sections use."""

import os
import re
from collections.abc import Iterator
from typing import Annotated, Any, get_args

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationInfo
from pydantic.fields import FieldInfo

from finetune.core.fields import Text

PositiveInt = Annotated[int, Field(ge=1)]
Fraction = Annotated[float, Field(ge=0, le=1)]
# What numpy and torch take, and still do with the number of a process added.
Seed = Annotated[int, Field(ge=0, le=2**31 - 1)]

_VARIABLE = re.compile(r"\$\{([A-Za-z_][A-Za-z0-9_]*)\}")
_PLACE, _PROMPT = "a place", "a prompt"  # marks in annotations


def _put_in(value: Any, info: ValidationInfo) -> Any:
    """Return a text with the values of the environment variables in it; ``info.context`` collects the result."""
    if not isinstance(value, str):
        return value
    if info.context is None:
        return _possible(value)
    if missing := [name for name in _VARIABLE.findall(value) if name not in os.environ]:
        raise ValueError(
            f"the environment variable {missing[0]} is not set. Set it, or give the value on the command line as "
            "KEY=VALUE"
        )
    text = _VARIABLE.sub(lambda match: os.environ[match[1]], value)
    if text != value:
        info.context.add(text)
    return _possible(text)


def _possible(path: str) -> str:
    if "\0" in path:
        raise ValueError("no file can have a name with a NUL character in it")
    return path


# Where something lies on one machine. Environment variables are put in here, as ${NAME}, and nowhere else.
Place = Annotated[str, BeforeValidator(_put_in), _PLACE]
# What a model is given: ${NAME} is a text like any other, and stays.
Prompt = Annotated[Text, _PROMPT]


class Section(BaseModel):
    """Base of all sections: frozen, typed strictly, unknown keys refused.

    The text under a field says in an editor what it is.
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
