"""A check of plain data against a JSON schema: the keywords that the recipe's schema uses, and no others."""

import re
from typing import Any

TYPES = {"object": dict, "array": list, "string": str, "integer": int, "number": int | float, "null": type(None)}
ABOUT = {"$schema", "$defs", "title", "description", "default", "discriminator"}


def problems(value: Any, schema: dict, root: dict, where: str = "") -> list[str]:
    """Returns what is wrong, each beginning with the place; nothing when the value fulfils the schema."""
    found: list[str] = []
    for keyword, wanted in schema.items():
        if keyword in ABOUT or keyword in ("additionalProperties", "propertyNames"):
            continue
        elif keyword == "$ref":
            found += problems(value, root["$defs"][wanted.removeprefix("#/$defs/")], root, where)
        elif keyword in ("anyOf", "oneOf"):
            tried = [problems(value, choice, root, where) for choice in wanted]
            fits = tried.count([])
            if fits == 0 or (keyword == "oneOf" and fits > 1):
                found += [f"{where}: fits {fits} of {keyword}", *min(tried, key=len)]
        elif keyword == "type":
            if not isinstance(value, TYPES[wanted]) or (isinstance(value, bool) and wanted != "boolean"):
                found.append(f"{where}: not of type {wanted}")
        elif keyword == "properties" and isinstance(value, dict):
            found += [p for key in value for p in _member(key, value[key], schema, root, where)]
        elif keyword == "required" and isinstance(value, dict):
            found += [f"{where}.{key}: missing" for key in wanted if key not in value]
        elif keyword == "items" and isinstance(value, list):
            found += [p for i, item in enumerate(value) for p in problems(item, wanted, root, f"{where}[{i}]")]
        elif not _holds(keyword, wanted, value):
            found.append(f"{where}: {value!r} breaks {keyword} {wanted}")
    if "properties" not in schema and schema.get("type") == "object" and isinstance(value, dict):
        found += [p for key in value for p in _member(key, value[key], schema, root, where)]
    return found


def _member(key: str, value: Any, schema: dict, root: dict, where: str) -> list[str]:
    place = f"{where}.{key}"
    found = problems(key, schema.get("propertyNames", {}), root, f"{place} (the key)")
    if key in schema.get("properties", {}):
        return found + problems(value, schema["properties"][key], root, place)
    others = schema.get("additionalProperties", True)
    if others is False:
        return [f"{place}: unknown key"]
    return found + ([] if others is True else problems(value, others, root, place))


def _holds(keyword: str, wanted: Any, value: Any) -> bool:
    number = isinstance(value, int | float) and not isinstance(value, bool)
    checks = {
        "const": lambda: value == wanted,
        "enum": lambda: value in wanted,
        "pattern": lambda: not isinstance(value, str) or re.search(wanted, value) is not None,
        "minLength": lambda: not isinstance(value, str) or len(value) >= wanted,
        "maxLength": lambda: not isinstance(value, str) or len(value) <= wanted,
        "minimum": lambda: not number or value >= wanted,
        "maximum": lambda: not number or value <= wanted,
        "exclusiveMinimum": lambda: not number or value > wanted,
        "exclusiveMaximum": lambda: not number or value < wanted,
        "properties": lambda: True,
        "required": lambda: True,
        "items": lambda: True,
    }
    return checks[keyword]()  # a KeyError: teach this file the keyword
