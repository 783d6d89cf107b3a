"""Checks of combinations that cannot work, made when the recipe is read and before a base is loaded."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

from finetune.errors import RecipeError
from finetune.lookup import import_string
from finetune.model_types import architecture_of, family_entry
from finetune.plugins import config_of, names
from finetune.recipe.data import StreamableData
from finetune.recipe.method import LoraSection
from finetune.recipe.objective import taking
from finetune.tables import EMBEDDED_BASES, INCOMPATIBLE

if TYPE_CHECKING:
    from finetune.recipe.method import MethodSection
    from finetune.recipe.model import ModelSection
    from finetune.recipe.whole import Recipe
    from finetune.tables import Incompatible


def refuse_incompatible(
    recipe: Recipe, *, source: str, model_type: str | None = None, architecture: str | None = None
) -> None:
    """Check a recipe for combinations that are known not to work.

    Args:
        recipe: the recipe to check.
        source: the name of the recipe in errors.
        model_type: the ``model_type`` of the base; None reads it from the config, if that is on this machine.
        architecture: the architecture of the base; by default the known one of its ``model_type``.

    Raises:
        RecipeError: a combination does not work; the message has the reason and the nearest choice that works.
    """
    if isinstance(recipe.data, StreamableData) and recipe.data.streaming and recipe.train.max_steps is None:
        raise RecipeError(
            f"{source}: data.streaming needs train.max_steps, got train.epochs {recipe.train.epochs:g}: the number of "
            "rows of a stream is unknown. Set train.max_steps, and train.epochs to null."
        )
    for objective in recipe.objectives:
        if objective.takes != (outputs := recipe.task.outputs):
            allowed = ", ".join(taking(outputs)) or "none"
            raise RecipeError(
                f"{source}: objective {objective.name} cannot be used with task {recipe.task.name}: the objective "
                f"takes {objective.takes}, but the task returns {outputs}. Allowed with this task: {allowed}."
            )
    model_type = model_type or known_model_type(recipe.model)
    entry = family_entry(model_type) if model_type else None
    architecture = architecture or (entry.architecture if entry else None)
    if model_type and (reason := why_incompatible(recipe.task.name, model_type, architecture=architecture)):
        raise RecipeError(f"{source}: {reason}")
    for section in recipe.parts:
        if entry and isinstance(section, LoraSection) and (reason := section.towers.why_not(entry.towers)):
            raise RecipeError(f"{source}: method.towers{reason}")
    for case in INCOMPATIBLE:
        asked = any(_uses(section, case.option) for section in recipe.parts)
        if asked and _holds(case, model_type, architecture) and case.quantization in (None, recipe.model.quantization):
            raise RecipeError(f"{source}: {_explain(case, model_type)}")


def why_incompatible(task: str, model_type: str, *, architecture: str | None = None) -> str | None:
    """Return the reason why a task cannot be used with a family's bases, with the tasks that can; None if it can.

    Args:
        task: the name of the task.
        model_type: the ``model_type`` of the family.
        architecture: the architecture of the family; by default the known one of its ``model_type``. If that is
            unknown too, the function returns None, and loading the base makes the check.
    """
    architecture = architecture or architecture_of(model_type)
    wanted = config_of("tasks", task, what="task", error=RecipeError).architectures
    if architecture is None or architecture in wanted:
        return None
    others = {name: config_of("tasks", name, what="task").architectures for name in names("tasks")}
    fitting = sorted(name for name, architectures in others.items() if architecture in architectures)
    instead = f"Set task.name to {' or '.join(fitting)}, or use" if fitting else "No task supports it yet. Use"
    return (
        f"task {task} cannot be used with {model_type}: the task needs a base of the architecture "
        f"{' or '.join(sorted(wanted))}, but {model_type} is {architecture}. {instead} another base."
    )


def _holds(case: Incompatible, model_type: str | None, architecture: str | None) -> bool:
    return case.model_type in (None, model_type) and case.architecture in (None, architecture)


def _explain(case: Incompatible, model_type: str | None) -> str:
    with_model = model_type if case.model_type or case.architecture else None
    where = " with ".join(part for part in (with_model, case.quantization) if part)
    return f"{case.option} cannot be used with {where}: {case.reason}. {case.instead}"


def known_model_type(model: ModelSection) -> str | None:
    """Return the ``model_type`` of a base whose config is on this machine; None if it is not."""
    folder = Path(import_string(target)()) if (target := EMBEDDED_BASES.get(model.name_or_path)) else None
    path: Path | None = (folder or Path(model.name_or_path)) / "config.json"
    if path is not None and not path.is_file():
        path = _in_hub_cache(model)
    try:
        return str(json.loads(path.read_bytes())["model_type"]) if path else None
    except (OSError, ValueError, KeyError, TypeError):
        return None  # loading the model raises an error with the cause


def _in_hub_cache(model: ModelSection) -> Path | None:
    from huggingface_hub import try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError

    try:
        found = try_to_load_from_cache(model.name_or_path, "config.json", revision=model.revision)
    except HFValidationError:
        return None
    return Path(found) if isinstance(found, str) else None


def _uses(section: MethodSection, option: str) -> bool:
    """Return whether a method's section uses ``option``, such as ``lora.use_dora`` or ``lora.towers.projector``."""
    name, *path = option.split(".")
    value: object = section
    for key in path:
        value = getattr(value, key, None)
    if section.name != name or not path:
        return section.name == name
    return getattr(value, "target_modules", value) not in ("none", None, False)
