"""The JSON schema of a recipe, by which editors complete and check the YAML.

A recipe names the schema in its first line: ``# yaml-language-server: $schema=../../../docs/recipe.schema.json``.
"""

import json
from typing import Any

from pydantic.json_schema import GenerateJsonSchema

from finetune.recipe.whole import Recipe


class _Untitled(GenerateJsonSchema):
    """A generator that leaves out the titles of fields, which only repeat the key."""

    def field_title_should_be_set(self, schema: Any) -> bool:
        return False


def recipe_schema() -> dict[str, Any]:
    """Return the JSON schema (draft 2020-12) of a recipe's YAML before its environment variables are replaced."""
    schema = Recipe.model_json_schema(schema_generator=_Untitled)
    return {"$schema": GenerateJsonSchema.schema_dialect, **schema}


def schema_text() -> str:
    """Return the text of ``docs/recipe.schema.json``."""
    return json.dumps(recipe_schema(), indent=2, ensure_ascii=False) + "\n"
