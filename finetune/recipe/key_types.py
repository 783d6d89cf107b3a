"""The type of a recipe's key in words, and an example of a value, both from the key's JSON schema."""

import re
from collections.abc import Mapping, Sequence
from typing import Any

_BOUNDS = {"minimum": "≥", "exclusiveMinimum": ">", "maximum": "≤", "exclusiveMaximum": "<"}
_TYPES = {"string": "text", "integer": "integer", "number": "number", "null": "`null`"}


def type_text(schema: Mapping[str, Any], places: Mapping[str, str]) -> str:
    """Return the type of a value in words, as Markdown.

    Args:
        schema: the JSON schema of the value.
        places: the name of each section's definition -> the link to its table.
    """
    words = dict.fromkeys(_alternatives(schema, places))
    return _either(sorted(words, key=lambda text: text == _TYPES["null"]))


def listed_values(schema: Mapping[str, Any]) -> list[Any]:
    """Return the values that a type lists one by one; empty if it lists none."""
    if schema.get("type") == "boolean":
        return [True, False]
    if schema.get("type") == "array":
        return [[value] for value in listed_values(schema["items"])]
    if "anyOf" in schema:
        return [value for part in schema["anyOf"] for value in listed_values(part)]
    return schema.get("enum", [schema["const"]] if "const" in schema else [])


def _alternatives(schema: Mapping[str, Any], places: Mapping[str, str]) -> list[str]:
    """Return the types that a value may have."""
    if "$ref" in schema:
        return [f"[section]({places[schema['$ref'].rpartition('/')[2]]})"]
    if parts := schema.get("anyOf", schema.get("oneOf")):
        return [text for part in parts for text in _alternatives(part, places)]
    if schema["type"] == "boolean":
        return ["`true`", "`false`"]
    if values := listed_values(schema) if schema["type"] != "array" else []:
        return [f"`{value}`" for value in values]
    return [_kind(schema, places)]


def _kind(schema: Mapping[str, Any], places: Mapping[str, str]) -> str:
    if schema["type"] == "array":
        number = f"{schema['minItems']} " if schema.get("minItems") == schema.get("maxItems", "none") else ""
        return f"list of {number}{_several(type_text(schema['items'], places))}"
    if schema["type"] == "object":
        keys = [f"`{key}`" for key in schema.get("propertyNames", {}).get("enum", [])]
        (values,) = schema.get("patternProperties", {"": schema.get("additionalProperties")}).values()
        return f"mapping of {', '.join(keys) or 'names'} to {type_text(values, places)}"
    limits = " and ".join(f"{sign} {schema[bound]}" for bound, sign in _BOUNDS.items() if bound in schema)
    return f"{_TYPES[schema['type']]} {limits}".strip()


def _either(words: Sequence[str]) -> str:
    *others, last = words
    return f"{', '.join(others)} or {last}" if others else last


def _several(text: str) -> str:
    return re.sub(r"^(text|integer|number|\[section)\b", r"\1s", text)
