"""Checks of a run before torch is imported."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

from finetune.adapters.base_check import check_base
from finetune.adapters.reference import AdapterRef, check_alias
from finetune.errors import FinetuneError, RecipeError, TrainingError, brief
from finetune.metrics.building import check_best_value
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
FEWEST_STEPS = 20  # the smallest number of steps of a learning-rate range test

# Settings that only compare answers, so an adapter may be evaluated with others than its own.
_OF_COMPARISON = {"metrics", "answer_normalization", "decimal_separator"}


def check_recipe(
    recipe: Recipe,
    *,
    splits: Sequence[str] = SPLITS,
    registry: AdapterRegistry | None = None,
    writes: bool = True,
    finished: bool = True,
) -> None:
    """Check the recipe, the data, the places and the base of a run without torch, the cheapest first.

    Only the main process writes and publishes, so only it checks the run's folder and the registry: another machine
    may have neither the registry nor the key.

    Args:
        recipe: the recipe, as ``load_recipe`` returns it.
        splits: the splits that the run reads.
        registry: the registry to publish to; the default one if None.
        writes: whether the run writes a folder and publishes.
        finished: whether to check the folder for earlier runs, by ``train.resume``; a sweep knows its own runs.

    Raises:
        FinetuneError: the first problem that would stop the run, with what to do.
    """
    if writes:
        AdapterRef.parse_name(recipe.adapter.publish or f"{recipe.domain}/{recipe.name}")
        for alias in recipe.adapter.aliases:
            check_alias(alias)
    if recipe.train.end_decided_validations:
        check_best_value(recipe.task)
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
            f"all recipes must name the same base, with the same settings of model, got {len(places)} "
            f"({', '.join(sorted(str(p[0]) for p in places))}). Evaluate the recipes of each base separately."
        )
    if len(settings := {how_rows_are_put(recipe) for recipe in recipes} - {None}) > 1:
        raise RecipeError(
            "all recipes must have the same data.supervise and data.max_image_pixels, got "
            f"{', '.join(sorted(map(str, settings)))}. Evaluate them one by one."
        )
    for recipe in recipes:
        if getattr(recipe.data, "test", "") is None:
            raise RecipeError(
                f"{recipe.name}: an evaluation needs test rows, but data.test is null. Set data.test in the recipe."
            )
        if "base" in refs and recipe.task.parts:
            parts = ", ".join(part.name for part in recipe.task.parts)
            raise RecipeError(
                f"{recipe.name}: the base alone cannot be evaluated with task {recipe.task.name}: the task predicts "
                f"with parts of its own ({parts}), which only adapters have. Remove base from the references."
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
            f"{recipe.name}: {ref} cannot be evaluated with task {task.name}: its own parts must be {brief(wanted)}, "
            f"got {brief(has)} (task {own.name}). Use a recipe with the task that the adapter was trained for."
        )
    settings = task.model_fields_set - _OF_COMPARISON if wanted else set()
    if different := sorted(key for key in settings if getattr(own, key, None) != getattr(task, key)):
        key = different[0]
        raise RecipeError(
            f"{recipe.name}: {ref} cannot be evaluated with task.{key} {brief(getattr(task, key))}: its part was "
            f"trained with {brief(getattr(own, key, None))}. Set task.{key} of the recipe to this value."
        )


def check_rates(first: float, last: float, steps: int) -> None:
    """Check the range of a learning-rate range test.

    Args:
        first: the learning rate of the first step.
        last: the learning rate of the last step.
        steps: the number of optimizer steps.

    Raises:
        RecipeError: the range is empty, or there are too few steps.
    """
    if not 0 < first < last:
        raise RecipeError(
            f"the first learning rate must be above 0, and the last one above the first, got {first} and {last}. Set "
            "other rates."
        )
    if steps < FEWEST_STEPS:
        raise RecipeError(
            f"a learning-rate range test must have at least {FEWEST_STEPS} steps, got {steps}. Set more steps."
        )


def how_rows_are_put(recipe: Recipe) -> tuple[str, int] | None:
    """Return the data settings that the base's processor needs; None if a program draws the rows."""
    return (recipe.data.supervise, recipe.data.max_image_pixels) if isinstance(recipe.data, ReadSection) else None
