"""Reading a recipe: strict YAML, overrides, environment variables, and one error that names file and key."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, get_args, get_origin, get_type_hints

import yaml
from pydantic import ValidationError

from finetune.errors import RecipeError, brief
from finetune.lookup import did_you_mean, look_up
from finetune.recipe.pairing import refuse_impossible
from finetune.recipe.section import Section, stray_variables
from finetune.recipe.whole import Recipe
from finetune.strict_yaml import StrictLoader
from finetune.tables import METHODS, SOURCES, TASKS


def load_recipe(path: str | Path, overrides: Sequence[str] = ()) -> Recipe:
    """Reads a recipe.

    Args:
        path: a YAML file.
        overrides: ``key.subkey=value`` strings, applied in order before environment variables are expanded;
            values are YAML.

    Raises:
        RecipeError: naming the file and the key, with what is allowed.
    """
    path = Path(path)
    try:
        raw = yaml.load(path.read_text(encoding="utf-8"), StrictLoader)
    except OSError as error:
        raise RecipeError(f"{path}: cannot be read: {error.strerror}") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise RecipeError(f"{path}: not YAML: {error}") from None
    if not isinstance(raw, dict):
        raise RecipeError(f"{path}: a recipe is a mapping with the keys {', '.join(Recipe.model_fields)}")
    for override in overrides:
        _apply_override(raw, override)
    return parse_recipe(raw, source=str(path))


def parse_recipe(raw: dict[str, Any], *, source: str) -> Recipe:
    """Builds a recipe from plain data; ``source`` names it in errors."""
    variables: set[str] = set()  # the texts that hold the value of one
    for section, table in (("method", METHODS), ("task", TASKS)):
        parts = raw.get(section)
        for part in parts if isinstance(parts, list) else [parts]:
            if isinstance(part, dict) and isinstance(name := part.get("name"), str):
                look_up(table, name, what=f"{section}.name in {source}", error=RecipeError)
    _check_sources(raw.get("data"), source)
    try:
        recipe = Recipe.model_validate(raw, context=variables)
    except ValidationError as error:
        problems = [_explain(e, raw) for e in error.errors()]
        raise RecipeError(f"{source}: " + f"\n{source}: ".join(problems)) from None
    for key, text in stray_variables(recipe):
        raise RecipeError(
            f"{source}: {key}: environment variables are put only into paths and model.name_or_path, got "
            f"{brief(text)}. What stands here may be published with the adapter: write the value itself, or give it on "
            f"the command line as {key}=VALUE"
        )
    refuse_impossible(recipe, source=source)
    return recipe.holding(frozenset(variables)) if variables else recipe


_SAID_AS = {
    "csv": "convert it to JSON Lines (one object a line), and set data.source=jsonl",
    "tsv": "convert it to JSON Lines (one object a line), and set data.source=jsonl",
    "json": "use data.source=jsonl, with one JSON object a line",
    "json_lines": "use data.source=jsonl",
    "ndjson": "use data.source=jsonl",
    "arrow": "save it with datasets' save_to_disk, and set data.source=saved",
    "disk": "use data.source=saved, for a folder that save_to_disk wrote",
    "save_to_disk": "use data.source=saved",
    "load_from_disk": "use data.source=saved",
    "imagefolder": "use data.source=hub with data.root=FOLDER, or write a JSON Lines file with a row for each image",
    "image_folder": "use data.source=hub with data.root=FOLDER, or write a JSON Lines file with a row for each image",
    "folder": "use data.source=jsonl, for JSON Lines beside their images",
    "huggingface": "use data.source=hub",
    "hf": "use data.source=hub",
    "datasets": "use data.source=hub, or data.source=saved for a folder that save_to_disk wrote",
    "dataset": "use data.source=hub, or data.source=saved for a folder that save_to_disk wrote",
    "webdataset": "convert it to Parquet, and set data.source=parquet with data.streaming=true",
    "synthetic": "use data.source=procedural",
}


def _check_sources(data: Any, source: str) -> None:
    """Raises RecipeError where a source of rows is unknown, with the one that is meant by a common name."""
    if not isinstance(data, dict):
        return
    parts = data.get("sources")
    inner = [part.get("data") for part in parts.values() if isinstance(part, dict)] if isinstance(parts, dict) else []
    for part in (data, *inner):
        if isinstance(part, dict) and isinstance(name := part.get("source"), str):
            if name not in SOURCES and (
                known := _SAID_AS.get(name.strip().lower().replace("-", "_").removeprefix("."))
            ):
                allowed = ", ".join(sorted(SOURCES))
                raise RecipeError(f"unknown data.source in {source} {name!r}: {known}. Allowed: {allowed}.")
            look_up(SOURCES, name, what=f"data.source in {source}", error=RecipeError)


def read_value(text: str, *, source: str) -> Any:
    """Returns the YAML value that ``text`` is; ``source`` names it in errors.

    Raises:
        RecipeError: it is not YAML.
    """
    try:
        return yaml.load(text, StrictLoader)
    except yaml.YAMLError as error:
        raise RecipeError(f"{source}: the value is not YAML: {error}") from None


def _apply_override(raw: dict[str, Any], override: str) -> None:
    key, equals, text = override.partition("=")
    parts = key.split(".")
    if not equals or not all(parts):
        raise RecipeError(f"override {override!r}: write key.subkey=value, such as train.learning_rate=5e-4")
    value = read_value(text, source=f"override {override!r}")
    place = raw
    for part in parts[:-1]:
        place = place.setdefault(part, {})
        if not isinstance(place, dict):
            raise RecipeError(f"override {override!r}: {part} is not a section: set it whole, {part}={{...}}")
    place[parts[-1]] = value


def _explain(error: Any, raw: dict[str, Any]) -> str:
    """Turns one pydantic error into a line that names the key and what is allowed."""
    location, section = _walk(error["loc"], raw)
    key = ".".join(location) or "top level"
    if error["type"] == "extra_forbidden":
        allowed = list(section.model_fields) if section else []
        return f"{key}: unknown key.{did_you_mean(location[-1], allowed)} Allowed here: {', '.join(allowed)}."
    if error["type"] == "missing":
        return f"{key}: missing; it has no default."
    message = error["msg"].removeprefix("Value error, ")
    got = "" if error["type"] == "value_error" else f" Got {error['input']!r}."
    return f"{key}: {message}.{got}"


def _walk(location: Sequence[int | str], raw: Any) -> tuple[list[str], type[Section] | None]:
    """Returns the keys of a pydantic location as they stand in the file, and the section that holds the last one.

    Where a section is one of several, pydantic puts the name that chose it into the location, and where one may stand
    for a list of one, its number; the file has neither.
    """
    keys: list[str] = []
    choices: list[type[Section]] = [Recipe]
    section: type[Section] | None = None
    named = False  # whether the next part is a name that the file's author gave
    for part in location:
        tagged = [choice for choice in choices if len(choices) > 1 and part in _tags(choice)]
        if tagged:
            choices = tagged
            continue
        if isinstance(part, int):
            if isinstance(raw, list):
                keys.append(str(part))
                raw = raw[part]
            continue
        keys.append(part)
        raw = raw.get(part) if isinstance(raw, dict) else None
        if named:
            named = False
            continue
        section = choices[0] if choices else None
        field = section.model_fields.get(part) if section else None
        choices = _sections_in(field.annotation if field else _others(section))
        named = bool(choices) and field is not None and get_origin(field.annotation) is dict
    return keys, section


def _others(section: type[Section] | None) -> Any:
    """Returns the type of the keys that a section takes beside its fields; None where it takes none."""
    if section is None or section.model_config.get("extra") != "allow":
        return None
    return get_type_hints(section)["__pydantic_extra__"]


def _tags(section: type[Section]) -> set[object]:
    """Returns the values by which a section is chosen among others: those its ``name`` or ``source`` may have."""
    fields = (section.model_fields.get(name) for name in ("name", "source"))
    return {value for field in fields if field for value in get_args(field.annotation)}


def _sections_in(annotation: Any) -> list[type[Section]]:
    if isinstance(annotation, type) and issubclass(annotation, Section):
        return [annotation]
    return [section for part in get_args(annotation) for section in _sections_in(part)]
