"""The JSON schema of a recipe, by which editors complete and check the YAML.

A file says where it is in its first line: ``# yaml-language-server: $schema=../../../docs/recipe.schema.json``.
"""

import json
from typing import Any

from pydantic.json_schema import GenerateJsonSchema

from finetune.recipe.whole import Recipe

VARIABLE = {
    "description": "An environment variable, put in before the recipe is checked.",
    "type": "string",
    "pattern": r"\$\{[A-Za-z_][A-Za-z0-9_]*\}",
}
_CONSTRAINTS = ("pattern", "enum", "minLength", "maxLength")


class _Untitled(GenerateJsonSchema):
    """Leaves out the titles of fields, which only say the key again."""

    def field_title_should_be_set(self, schema: Any) -> bool:
        return False


def recipe_schema() -> dict[str, Any]:
    """Returns the JSON schema (draft 2020-12) that a recipe's YAML fulfils before its variables are put in."""
    schema = _open(Recipe.model_json_schema(schema_generator=_Untitled))
    schema["$defs"]["Variable"] = VARIABLE
    return {"$schema": GenerateJsonSchema.schema_dialect, **schema}


def schema_text() -> str:
    """Returns the schema as it stands in ``docs/recipe.schema.json``."""
    return json.dumps(recipe_schema(), indent=2, ensure_ascii=False) + "\n"


def _open(node: Any) -> Any:
    """Returns the schema with ``${NAME}`` allowed wherever a text is.

    Not in place of a ``const``: that is the word by which one of several sections is chosen.
    """
    if isinstance(node, list):
        return [_open(part) for part in node]
    if not isinstance(node, dict):
        return node
    if node.get("type") == "string" and any(name in node for name in _CONSTRAINTS):
        text = {name: node[name] for name in ("type", *_CONSTRAINTS) if name in node}
        about = {name: value for name, value in node.items() if name not in text}
        return {**about, "anyOf": [text, {"$ref": "#/$defs/Variable"}]}
    # The names of properties are no values: nothing is put in there.
    return {key: part if key in ("propertyNames", "default", "enum") else _open(part) for key, part in node.items()}
