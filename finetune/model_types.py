"""Facts about a base from its `model_type` alone, before torch is imported."""

from __future__ import annotations

import ast
from functools import cache
from importlib.util import find_spec
from pathlib import Path

from finetune.plugins import find, is_known
from finetune.tables import FAMILIES, GENERIC_FAMILY, FamilyEntry

_GENERIC_TABLE = "MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES"  # of transformers


def family_entry(model_type: str) -> FamilyEntry | None:
    """Return the entry of the family for models of a type; None for an unknown type."""
    if model_type in FAMILIES:
        return FAMILIES[model_type]
    if is_known("families", model_type):
        family = find("families", model_type, what="model_type")
        return FamilyEntry(
            f"{family.__module__}:{family.__qualname__}",
            architecture=family.architecture,
            towers=tuple(getattr(family, "tower_paths", ())) or FamilyEntry.towers,
        )
    return GENERIC_FAMILY if model_type in (generic_model_types() or ()) else None


def architecture_of(model_type: str) -> str | None:
    """Return the architecture of models of a type; None for an unknown type."""
    entry = family_entry(model_type)
    return entry.architecture if entry else None


@cache
def generic_model_types() -> frozenset[str] | None:
    """Return the types that AutoModelForImageTextToText loads; None if they cannot be read.

    It reads the table from the source file: an import would import torch, which takes seconds.
    """
    spec = find_spec("transformers")
    places = spec.submodule_search_locations if spec else None
    try:
        source = (Path((places or [])[0]) / "models" / "auto" / "modeling_auto.py").read_text(encoding="utf-8")
        start = source.index(f"\n{_GENERIC_TABLE} =")
        table = ast.parse(source[start : source.index("\n)", start) + 2]).body[0]
        call = table.value  # type: ignore[attr-defined]
        return frozenset(str(key) for key, _ in ast.literal_eval(call.args[0]))
    except (OSError, IndexError, ValueError, SyntaxError, AttributeError, TypeError):
        return None  # the loader looks the family up again before it reads weights
