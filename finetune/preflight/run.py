"""Checks of a run before torch is imported."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

from finetune.adapters.base_check import check_base
from finetune.adapters.reference import AdapterRef, check_alias
from finetune.errors import FinetuneError, RecipeError, TrainingError, brief
from finetune.preflight.data import check_heads, check_paths
from finetune.preflight.finished_runs import refuse_taken
from finetune.preflight.places import check_output_folder, check_registry
from finetune.preflight.use import check_reference
from finetune.recipe import ReadSection
from finetune.registry import AdapterRegistry

if TYPE_CHECKING:
    from collections.abc import Sequence

    from finetune.recipe import Recipe, TaskSection

SPLITS = ("train", "val", "test")
FEWEST_STEPS = 20  # of a learning-rate range test


_OF_COMPARISON = {"metrics", "answer_normalization", "decimal_separator"}  # of answers, whatever predicts them


def check_recipe(
    recipe: Recipe,
    *,
    splits: Sequence[str] = SPLITS,
    registry: AdapterRegistry | None = None,
    writes: bool = True,
    finished: bool = True,
) -> None:
    """Check everything of a run that its files show, the cheapest first.

    Of several processes only the main one writes and publishes, so only it checks these places: another machine may
    have neither the registry nor the key.

    Args:
        recipe: the recipe, as ``load_recipe`` returns it.
        splits: the splits that the run reads.
        registry: the registry to publish to; the default one if None.
        writes: whether the run leaves a folder and publishes.
        finished: whether to check the folder for earlier runs, as ``train.resume`` says; a sweep knows its own runs.

    Raises:
        FinetuneError: the first problem that would stop the run, with what to do.
    """
    if writes:
        AdapterRef.parse_name(recipe.adapter.publish or f"{recipe.domain}/{recipe.name}")
        for alias in recipe.adapter.aliases:
            check_alias(alias)
    check_paths(recipe.data, splits)
    if writes and os.environ.get("RANK", "0") == "0":
        check_output_folder(recipe.run_folder, key="train.output_dir")
        if finished:
            refuse_taken(recipe)
        if recipe.adapter.publish:
            check_registry(registry or AdapterRegistry(), recipe.adapter.publish, recipe.adapter.aliases)
    if writes and recipe.adapter.init_from:
        _check_parent(recipe.adapter.init_from, registry or AdapterRegistry())
    check_base(recipe.model.name_or_path, revision=recipe.model.revision)
    check_heads(recipe.data, splits, task=recipe.task)


def _check_parent(ref: str, registry: AdapterRegistry) -> None:
    try:
        check_reference(ref, registry)
    except FinetuneError as error:
        raise TrainingError(f"adapter.init_from: {ref}: {error}") from error


def check_comparison(
    refs: Sequence[str], recipes: Sequence[Recipe], *, registry: AdapterRegistry | None = None
) -> None:
    """Check that adapters can be evaluated on the test rows of recipes, on one base.

    Args:
        refs: registry references, adapter folders, or ``base``.
        recipes: the recipes with the test rows.
        registry: the registry in which names are looked up; the default one if None.

    Raises:
        RecipeError: the recipes do not name one base, or have no test split.
        FinetuneError: a reference, the base or the data cannot be used.
    """
    places = {(r.model.name_or_path, r.model.revision, r.model.dtype, r.model.quantization) for r in recipes}
    if len(places) != 1:
        raise RecipeError(
            f"the configs name {len(places)} bases ({', '.join(sorted(str(p[0]) for p in places))}); adapters are "
            "compared on one"
        )
    if len({how_rows_are_put(recipe) for recipe in recipes} - {None}) > 1:
        raise RecipeError("the configs differ in data.supervise or data.max_image_pixels; evaluate them one by one")
    for recipe in recipes:
        if getattr(recipe.data, "test", "") is None:
            raise RecipeError(f"{recipe.name}: the recipe has no test split to evaluate on")
        if "base" in refs and recipe.task.parts:
            parts = ", ".join(part.name for part in recipe.task.parts)
            raise RecipeError(
                f"{recipe.name}: the base alone cannot be evaluated: task {recipe.task.name} predicts by parts of its "
                f"own ({parts}), which only adapters have. Leave base out."
            )
    registry = registry or AdapterRegistry()
    for ref in refs:
        if ref != "base":
            manifest = check_reference(ref, registry)
            for recipe in recipes:
                _require_parts(ref, manifest.task, recipe)
    for recipe in recipes:
        check_recipe(recipe, splits=("test",), writes=False)


def _require_parts(ref: str, own: TaskSection, recipe: Recipe) -> None:
    """Check that an adapter has the parts by which the task of a recipe predicts, trained with the same settings."""
    task = recipe.task
    has, wanted = ({part.name: part.model_dump(exclude={"lr_ratio"}) for part in each.parts} for each in (own, task))
    if has != wanted:
        raise RecipeError(
            f"{recipe.name}: {ref} cannot be evaluated with task {task.name}: the task's own parts must be "
            f"{brief(wanted)}, and those of its task {own.name} are {brief(has)}."
        )
    settings = task.model_fields_set - _OF_COMPARISON if wanted else set()
    if different := sorted(key for key in settings if getattr(own, key, None) != getattr(task, key)):
        key = different[0]
        raise RecipeError(
            f"{recipe.name}: {ref} cannot be evaluated with task.{key} {brief(getattr(task, key))}: its part was "
            f"trained with {brief(getattr(own, key, None))}. Set the recipe's to that."
        )


def check_rates(first: float, last: float, steps: int) -> None:
    """Check the range of a learning-rate range test.

    Raises:
        RecipeError: the range is empty, or there are too few steps.
    """
    if not 0 < first < last:
        raise RecipeError(f"the learning rate must grow from above 0, not from {first} to {last}")
    if steps < FEWEST_STEPS:
        raise RecipeError(f"{steps} steps are too few to see a curve; give at least {FEWEST_STEPS}")


def how_rows_are_put(recipe: Recipe) -> tuple[str, int] | None:
    """Return the data settings with which the base's processor is made; None where rows are drawn."""
    return (recipe.data.supervise, recipe.data.max_image_pixels) if isinstance(recipe.data, ReadSection) else None
