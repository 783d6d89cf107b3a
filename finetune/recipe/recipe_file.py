"""Reading a recipe: strict YAML, overrides, environment variables, and one error that names file and key."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Annotated, Any, get_args, get_origin, get_type_hints

from pydantic import ValidationError

from finetune.core.old_names import RECIPE, current_names, had_earlier_names, other_names
from finetune.errors import RecipeError, brief
from finetune.lookup import did_you_mean
from finetune.plugins import config_of, is_known, names, require_known
from finetune.recipe.chosen import Choice
from finetune.recipe.compatibility import refuse_incompatible
from finetune.recipe.section import Section, stray_variables
from finetune.recipe.whole import Recipe


def load_recipe(path: str | Path, overrides: Sequence[str] = ()) -> Recipe:
    """Read a recipe.

    Args:
        path: a YAML file.
        overrides: the ``key.subkey=value`` strings, applied in order before environment variables are expanded;
            values are YAML.

    Raises:
        RecipeError: the recipe cannot be read or used; the message names the file, the key and the allowed values.
    """
    import yaml  # a manifest is read without it

    from finetune.core.strict_yaml import StrictLoader

    path = Path(path)
    try:
        raw = yaml.load(path.read_text(encoding="utf-8"), StrictLoader)
    except OSError as error:
        raise RecipeError(f"{path}: the recipe cannot be read: {error.strerror}. Check the path.") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise RecipeError(f"{path}: the recipe must be valid YAML: {error}") from None
    if not isinstance(raw, dict):
        keys = ", ".join(Recipe.model_fields)
        raise RecipeError(f"{path}: a recipe must be a mapping with the keys {keys}, got {brief(raw)}")
    for override in overrides:
        _apply_override(raw, override)
    return parse_recipe(raw, source=str(path))


def parse_recipe(raw: dict[str, Any], *, source: str) -> Recipe:
    """Build a recipe from plain data.

    Args:
        raw: the recipe as plain data.
        source: the name of the recipe in errors.

    Raises:
        RecipeError: the recipe cannot be used; the message names the source, the key and the allowed values.
    """
    raw = current_names(raw, RECIPE, source=source, error=RecipeError)
    variables: set[str] = set()  # the texts that hold the value of an environment variable
    for section, group in (("method", "methods"), ("task", "tasks"), ("objective", "objectives")):
        parts = raw.get(section)
        for part in parts if isinstance(parts, list) else [parts]:
            if isinstance(part, dict) and isinstance(name := part.get("name"), str):
                with _in_source(source):
                    config_of(group, name, what=f"{section}.name", error=RecipeError)
    with _in_source(source):
        _check_sources(raw.get("data"))
    try:
        recipe = Recipe.model_validate(raw, context=variables)
    except ValidationError as error:
        problems = [_explain(e, raw) for e in error.errors()]
        raise RecipeError(f"{source}: " + f"\n{source}: ".join(problems)) from None
    for key, text in stray_variables(recipe):
        raise RecipeError(
            f"{source}: {key}: environment variables are allowed only in paths and in model.name_or_path, got "
            f"{brief(text)}. This value may be published with the adapter. Write the value itself, or set it on the "
            f"command line as {key}=VALUE."
        )
    with _in_source(source):
        for name in recipe.task.metrics or ():
            require_known("metrics", name, what="metric (task.metrics)", error=RecipeError)
    refuse_incompatible(recipe, source=source)
    return recipe.holding(frozenset(variables)) if variables else recipe


@contextmanager
def _in_source(source: str) -> Iterator[None]:
    """Put the name of the recipe before the message of a RecipeError."""
    try:
        yield
    except RecipeError as error:
        raise RecipeError(f"{source}: {error}") from None


_COMMON_NAMES = {  # of sources, as other tools call them -> what to do
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


def _check_sources(data: Any) -> None:
    """Raise RecipeError for an unknown source of rows, with the one that a common name means."""
    if not isinstance(data, dict):
        return
    parts = data.get("sources")
    inner = [part.get("data") for part in parts.values() if isinstance(part, dict)] if isinstance(parts, dict) else []
    for part in (data, *inner):
        if isinstance(part, dict) and isinstance(name := part.get("source"), str):
            if not is_known("sources", name) and (
                advice := _COMMON_NAMES.get(name.strip().lower().replace("-", "_").removeprefix("."))
            ):
                allowed = ", ".join(sorted(names("sources")))
                raise RecipeError(f"unknown data.source {name!r}: {advice}. Allowed: {allowed}.")
            config_of("sources", name, what="data.source", error=RecipeError)


def read_value(text: str, *, source: str) -> Any:
    """Return the value of a YAML text.

    Args:
        text: the YAML text.
        source: the name of the text in errors.

    Raises:
        RecipeError: the text is not valid YAML.
    """
    import yaml

    from finetune.core.strict_yaml import StrictLoader

    try:
        return yaml.load(text, StrictLoader)
    except yaml.YAMLError as error:
        raise RecipeError(f"{source}: the value must be valid YAML: {error}") from None


def _apply_override(raw: dict[str, Any], override: str) -> None:
    key, equals, text = override.partition("=")
    parts = key.split(".")
    if not equals or not all(parts):
        raise RecipeError(
            f"an override must have the form key.subkey=value, got {override!r}. Write it like "
            "train.learning_rate=5e-4."
        )
    value = read_value(text, source=f"override {override!r}")
    place = raw
    for depth, part in enumerate(parts[:-1], start=1):
        place = place.setdefault(part, {})
        if not isinstance(place, dict):
            section = ".".join(parts[:depth])
            raise RecipeError(
                f"override {override!r}: {section} must be a section, got {brief(place)}. Set all of it, as in "
                f"{section}={{...}}."
            )
    if had_earlier_names(place):
        for name in other_names(key, RECIPE):
            place.pop(name, None)
    place[parts[-1]] = value


def _explain(error: Any, raw: dict[str, Any]) -> str:
    """Turn one pydantic error into a line that names the key and the allowed values."""
    location, section = _walk(error["loc"], raw)
    key = ".".join(location) or "top level"
    if error["type"] == "extra_forbidden":
        allowed = list(section.model_fields) if section else []
        return f"{key}: unknown key.{did_you_mean(location[-1], allowed)} Allowed here: {', '.join(allowed)}."
    if error["type"] == "missing":
        return f"{key}: this key is missing and has no default. Set it."
    message = error["msg"].removeprefix("Value error, ")
    got = "" if error["type"] == "value_error" else f" Got {error['input']!r}."
    return f"{key}: {message}.{got}"


def _walk(location: Sequence[int | str], raw: Any) -> tuple[list[str], type[Section] | None]:
    """Return the keys of a pydantic location as they are in the file, and the section that holds the last one.

    The file may have one section in the place of a list of one. Pydantic's location then has an index, the file none.
    """
    keys: list[str] = []
    section: type[Section] | None = None
    annotation: Any = Recipe  # of ``raw``
    for part in location:
        if isinstance(part, int):
            if isinstance(raw, list):
                keys.append(str(part))
                raw = raw[part]
            continue
        keys.append(part)
        section = _section(annotation, raw)
        annotation = _annotation(annotation, section, part)
        raw = raw.get(part) if isinstance(raw, dict) else None
    return keys, section


def _section(annotation: Any, raw: Any) -> type[Section] | None:
    """Return the class of the section that ``raw`` was read as; None if its annotation allows no section."""
    if isinstance(annotation, type) and issubclass(annotation, Section):
        return annotation
    origin, arguments = get_origin(annotation), get_args(annotation)
    if origin is dict:  # the file's author chose its keys
        return None
    if origin is Annotated:
        choice = next((mark for mark in arguments[1:] if isinstance(mark, Choice)), None)
        if choice is not None and isinstance(raw, dict):
            with suppress(ValueError):
                return choice.config(raw)
        arguments = arguments[:1]
    return next((found for part in arguments if (found := _section(part, raw))), None)


def _annotation(annotation: Any, section: type[Section] | None, key: str) -> Any:
    """Return the annotation of the value under ``key``; None if it is unknown."""
    if section is not None:
        if field := section.model_fields.get(key):
            return Annotated[field.annotation, *field.metadata, ...]
        takes_others = section.model_config.get("extra") == "allow"
        return get_type_hints(section, include_extras=True)["__pydantic_extra__"].__args__[1] if takes_others else None
    while get_origin(annotation) is Annotated:
        annotation = get_args(annotation)[0]
    return get_args(annotation)[1] if get_origin(annotation) is dict else None
