"""What cannot go together, said when the recipe is read and not after a base was loaded."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

from finetune.errors import RecipeError
from finetune.lookup import import_string
from finetune.recipe.data import StreamableData
from finetune.tables import EMBEDDED_BASES, IMPOSSIBLE

if TYPE_CHECKING:
    from finetune.recipe.method import MethodSection
    from finetune.recipe.model import ModelSection
    from finetune.recipe.whole import Recipe


def refuse_impossible(recipe: Recipe, *, source: str) -> None:
    """Checks a recipe against what is known not to work.

    Raises:
        RecipeError: with the reason and the nearest choice that works.
    """
    if isinstance(recipe.data, StreamableData) and recipe.data.streaming and recipe.train.max_steps is None:
        raise RecipeError(
            f"{source}: data.streaming does not go with train.epochs: nobody knows how many rows a stream has. Set "
            "train.max_steps, and train.epochs to null."
        )
    model_type = known_model_type(recipe.model)
    for case in IMPOSSIBLE:
        fits = case.model_type in (None, model_type) and case.quantization in (None, recipe.model.quantization)
        if fits and any(_uses(section, case.option) for section in recipe.method):
            where = " with ".join(str(part) for part in (case.model_type, case.quantization) if part)
            raise RecipeError(f"{source}: {case.option} does not go with {where}: {case.reason}. {case.instead}")


def known_model_type(model: ModelSection) -> str | None:
    """Returns the ``model_type`` of a base whose config is on this machine; None where it is not."""
    folder = Path(import_string(target)()) if (target := EMBEDDED_BASES.get(model.name_or_path)) else None
    path: Path | None = (folder or Path(model.name_or_path)) / "config.json"
    if path is not None and not path.is_file():
        path = _in_hub_cache(model)
    try:
        return str(json.loads(path.read_bytes())["model_type"]) if path else None
    except (OSError, ValueError, KeyError, TypeError):
        return None  # loading the model says what is wrong with it


def _in_hub_cache(model: ModelSection) -> Path | None:
    from huggingface_hub import try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError

    try:
        found = try_to_load_from_cache(model.name_or_path, "config.json", revision=model.revision)
    except HFValidationError:
        return None
    return Path(found) if isinstance(found, str) else None


def _uses(section: MethodSection, option: str) -> bool:
    """Tells whether a method's section asks for ``option``, such as ``lora.use_dora`` or ``lora.towers.projector``."""
    name, *path = option.split(".")
    value: object = section
    for key in path:
        value = getattr(value, key, None)
    if section.name != name or not path:
        return section.name == name
    return getattr(value, "target_modules", value) not in ("none", None, False)
