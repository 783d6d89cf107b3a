"""Loading a base, by name or by recipe, after the checks that it supports the recipe."""

from __future__ import annotations

from typing import TYPE_CHECKING

from finetune.adapters.base_check import check_base
from finetune.adapters.base_identity import identify_base, identify_processor
from finetune.assemble.base import Base
from finetune.core.matmul import speed_up
from finetune.errors import RecipeError
from finetune.families.base import embedded_path, family_of
from finetune.families.placement import pick_device, pick_dtype
from finetune.methods.adapter import check_methods
from finetune.plugins import find
from finetune.recipe import (
    ReadSection,
    refuse_incompatible,
    tasks_for,
)

if TYPE_CHECKING:
    from finetune.recipe import AttnImplementation, Quantization, Recipe


def load_base(
    name_or_path: str,
    *,
    revision: str | None = None,
    dtype: str = "float32",
    device: str = "auto",
    quantization: Quantization | None = None,
    attn_implementation: AttnImplementation = "auto",
    verify: str = "cached",
    data: ReadSection | None = None,
) -> Base:
    """Load a base: an embedded one by name, a folder, or a hub id.

    Args:
        name_or_path: the base to load.
        revision: the revision of a hub id.
        dtype: the dtype of the base's weights, as for ``pick_dtype``.
        device: the device of the base, as for ``pick_device``.
        quantization: the quantization of the language tower, ``4bit`` or ``8bit``.
        attn_implementation: the implementation of attention; ``auto`` leaves the choice to transformers.
        verify: ``cached`` trusts digests of files that have not changed; ``full`` hashes every byte.
        data: the section with the supervised turns and the largest image.

    Raises:
        ModelError: the base cannot be loaded, or no family supports it.
    """
    check_base(name_or_path, revision=revision)
    path = embedded_path(name_or_path)
    family = family_of(path, revision=revision)
    tasks_for(family.architecture)
    identity = identify_base(path, revision=revision, verify=verify)  # before any byte is loaded
    model, processor = family.load(
        path,
        revision=revision,
        dtype=pick_dtype(dtype, path, revision=revision),
        device=pick_device(device),
        quantization=quantization,
        attn_implementation=attn_implementation,
    )
    speed_up(model.modules())
    base = Base(
        model=model,
        processor=processor,
        family=family,
        path=path,
        quantization=quantization,
        identity=identity,
        digests=identify_processor(path, revision=revision, chat_template=str(processor.chat_template or "")),
        data=data,
    )
    _ = base.collator  # fails now if the base lacks something that its collator needs
    return base


def check_method(recipe: Recipe) -> None:
    """Check that the base has the modules which a recipe's method adapts, before its weights or a row are read.

    Raises:
        RecipeError: the base does not support a setting of the recipe.
        ModelError: there is no such base, or its towers cannot be found.
        MethodError: the base lacks a module.
    """
    section = recipe.model
    check_base(section.name_or_path, revision=section.revision)
    path = embedded_path(section.name_or_path)
    family = family_of(path, revision=section.revision)
    tasks_for(family.architecture)
    _refuse_references(recipe)
    refuse_incompatible(recipe, source=recipe.name, model_type=family.model_type, architecture=family.architecture)
    try:
        skeleton = family.skeleton(path, revision=section.revision)
    except Exception:  # the class needs weights to be built; ``attach`` checks the same on the loaded model
        return
    check_methods(skeleton, family.towers(skeleton), recipe.parts)


def base_of(recipe: Recipe, *, device: str | None = None) -> Base:
    """Load the base that a recipe names.

    Raises:
        RecipeError: the base does not support a setting of the recipe.
        ModelError: the base cannot be loaded.
    """
    section = recipe.model
    check_base(section.name_or_path, revision=section.revision)
    family = family_of(embedded_path(section.name_or_path), revision=section.revision)
    refuse_incompatible(recipe, source=recipe.name, model_type=family.model_type, architecture=family.architecture)
    return load_base(
        section.name_or_path,
        revision=section.revision,
        dtype=section.dtype,
        device=device or section.device,
        quantization=section.quantization,
        attn_implementation=section.attn_implementation,
        data=recipe.data if isinstance(recipe.data, ReadSection) else None,
    )


def _refuse_references(recipe: Recipe) -> None:
    """Refuse an objective that needs the base alone for a task whose outputs need parts of an adapter."""
    for section in recipe.objectives if recipe.task.parts else ():
        if find("objectives", section.name, what="objective").needs_reference:
            raise RecipeError(
                f"{recipe.name}: objective {section.name} needs the outputs of the base alone, but task "
                f"{recipe.task.name} has outputs only with the adapter's own parts. Name another objective."
            )
