"""A module by its full name, faster than ``get_submodule``, since a load looks up hundreds."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from finetune.errors import ManifestError, brief

if TYPE_CHECKING:
    from torch import nn

    from finetune.interfaces import Towers


def module_at(model: nn.Module, path: str) -> nn.Module:
    """Return the module of ``model`` with this full name; the model itself for an empty name.

    Raises:
        KeyError: the model has no such module.
    """
    module = model
    for part in path.split(".") if path else ():
        child = module._modules[part]
        if child is None:  # torch keeps None for a module that the config leaves out
            raise KeyError(path)
        module = child
    return module


def language_head(model: Any) -> nn.Module | None:
    """Return the module that computes logits; None if the model has none, such as a dual encoder."""
    try:
        head: nn.Module | None = model.get_output_embeddings()
    except NotImplementedError:
        return None
    return head


def tower_paths(towers: Towers, tower: str) -> tuple[str, ...]:
    """Return the full names of the modules of a tower from a manifest.

    Raises:
        ManifestError: this base has no such tower.
    """
    if tower not in towers:
        raise ManifestError(
            f"the adapter changes modules of the tower {brief(tower)}, but this base only has {', '.join(towers)}. "
            "Load the base of the training."
        )
    return towers[tower]
