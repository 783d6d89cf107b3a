"""Sections whose class is looked up by a name in them, plug-ins included."""

from dataclasses import dataclass
from functools import reduce
from operator import or_
from typing import Annotated, Any, get_args

from pydantic import Field, GetCoreSchemaHandler, GetJsonSchemaHandler, TypeAdapter, ValidationInfo
from pydantic.json_schema import JsonSchemaValue
from pydantic_core import CoreSchema, core_schema

from finetune.errors import brief
from finetune.plugins import config_of, names, own_configs
from finetune.recipe.section import Section


@dataclass(frozen=True)
class Choice:
    """Mark of a field that holds one of several sections: ``Annotated[SerializeAsAny[TaskSection], Choice(...)]``.

    Attributes:
        group: the group of plug-ins, such as ``"tasks"``.
        key: the field of the section that holds its name.
        default: the name of a section that has no such field; None if the field is required.
        without: the names of the package's own sections that are not allowed here.
    """

    group: str
    key: str = "name"
    default: str | None = None
    without: tuple[str, ...] = ()

    def config(self, value: Any) -> Any:
        """Return the class of the section that plain data asks for.

        Raises:
            ValueError: the section has no name, or a name that is unknown or not allowed here.
        """
        name = value.get(self.key, self.default)
        if not isinstance(name, str):
            got = brief(name) if self.key in value else "nothing"
            raise ValueError(f"{self.key} must be one of {self._allowed()}, got {got}")
        if name in self.without:
            raise ValueError(f"{self.key} must be one of {self._allowed()}, got {name!r}")
        return config_of(self.group, name, what=self.key)

    def __get_pydantic_core_schema__(self, source: Any, handler: GetCoreSchemaHandler) -> CoreSchema:
        """Return the schema by which a mapping becomes the section that it names."""
        return core_schema.with_info_before_validator_function(self._validate, handler(source))

    def __get_pydantic_json_schema__(self, core: CoreSchema, handler: GetJsonSchemaHandler) -> JsonSchemaValue:
        """Return the schema of the package's own sections; an editor does not know those of plug-ins."""
        allowed = [config for config in own_configs(self.group) if _name(config, self.key) not in self.without]
        union: Any = Annotated[reduce(or_, allowed), Field(discriminator=self.key)]
        return handler(TypeAdapter(union).core_schema)

    def _allowed(self) -> str:
        return ", ".join(sorted(name for name in names(self.group) if name not in self.without))

    def _validate(self, value: Any, info: ValidationInfo) -> Any:
        if not isinstance(value, dict):
            return value
        return self.config(value).model_validate(value, context=info.context)


def as_list(value: Any) -> Any:
    """Return one section as a list of one, and a list as it is."""
    return [value] if isinstance(value, dict | Section) else value


def _name(config: type[Section], key: str) -> Any:
    return get_args(config.model_fields[key].annotation)[0]
