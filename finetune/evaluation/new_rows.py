"""Recipes for rows of a file that no recipe names, with the prompts of an adapter's training. Imports no torch."""

from __future__ import annotations

import glob
import re
from typing import TYPE_CHECKING, Any

from finetune.core.outside_text import safe_line
from finetune.errors import RecipeError
from finetune.lookup import did_you_mean
from finetune.model_types import architecture_of
from finetune.recipe import ColumnData, ModelSection, parse_recipe, task_of
from finetune.recipe.compatibility import known_model_type

if TYPE_CHECKING:
    from pathlib import Path

    from finetune.adapters.manifest import AdapterManifest
    from finetune.recipe import Recipe

_SOURCES = {".jsonl": "jsonl", ".ndjson": "jsonl", ".parquet": "parquet"}
# The settings of rows in a published recipe, except their place, their number and their length.
_FIELDS = ColumnData.model_fields.keys() - {"source", "max_rows", "max_length", "too_long"}
_METHOD = {"name": "lora"}  # a recipe must name a method; an evaluation attaches none


def with_rows(recipe: Recipe, file: Path) -> Recipe:
    """Return a recipe whose test rows are those of a file, with the names of fields of its own rows.

    Args:
        recipe: the recipe with all other settings.
        file: a file of JSON Lines or Parquet; paths of images are relative to its folder.

    Raises:
        RecipeError: the file does not exist or has another format, or the recipe mixes several sources.
    """
    return _recipe(recipe.model_dump(mode="json"), file)


def recipe_for(manifest: AdapterManifest | None, *, base: str, file: Path) -> Recipe:
    """Return a recipe that evaluates rows of a file with the prompts of an adapter's training.

    Args:
        manifest: the manifest of the adapter; None for the base alone, with the defaults of its task.
        base: the folder, hub id or embedded name of the base.
        file: the file of the rows, as for ``with_rows``.

    Raises:
        RecipeError: as for ``with_rows``.
    """
    raw: dict[str, Any] = {"domain": "new", "model": {"name_or_path": base}, "method": _METHOD}
    if manifest is None:
        model_type = known_model_type(ModelSection(name_or_path=base))
        architecture = architecture_of(model_type) if model_type else None
        return _recipe(raw | {"task": task_of(architecture).model_dump(mode="json")}, file)
    raw |= {"domain": manifest.training.domain, "task": manifest.task.model_dump(mode="json")}
    if manifest.task.parts:
        raw["method"] = []
    if manifest.base.revision and base == manifest.base.hub_id:
        raw["model"]["revision"] = manifest.base.revision
    trained = (manifest.training.recipe or {}).get("data")
    images = {"image_range": manifest.images.range, "image_page": manifest.images.page}
    opened = {key: value for key, value in images.items() if value is not None}
    return _recipe(raw | {"data": {**(trained if isinstance(trained, dict) else {}), **opened}}, file)


def _recipe(raw: dict[str, Any], file: Path) -> Recipe:
    source = _SOURCES.get(file.suffix.lower())
    if source is None:
        allowed = ", ".join(_SOURCES)
        raise RecipeError(
            f"--data {file}: the name of the file must end in one of {allowed}, got {file.suffix or 'no ending'}. "
            "Convert the file first."
        )
    if not file.is_file():
        beside = [one.name for one in file.parent.glob(f"*{file.suffix}") if did_you_mean(file.stem, [one.stem])]
        raise RecipeError(
            f"--data {file}: the file must exist, and does not.{did_you_mean(file.name, beside)} Check the path."
        )
    data = raw.get("data", {})
    if data.get("source") == "mix":
        raise RecipeError(
            f"--data {file}: the recipe must have one source of rows, which names their fields, got a mix. Give a "
            "recipe with one source with --on."
        )
    fields = {key: value for key, value in data.items() if key in _FIELDS}
    test = glob.escape(file.name) if source == "parquet" else file.name  # data.test is a pattern for Parquet
    place = {"source": source, "root": str(file.absolute().parent), "test": test, "val": None}
    name = re.sub(r"[^a-z0-9]+", "-", file.stem.lower()).strip("-")[:64].strip("-") or "rows"
    changed = {"name": name, "data": fields | place, "train": raw.get("train", {"epochs": 1})}
    return parse_recipe(raw | changed, source=f"--data {safe_line(str(file))}")
