"""A module by its full name, found without the detours of ``get_submodule``: a load asks for hundreds."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from finetune.errors import ManifestError, brief

if TYPE_CHECKING:
    from torch import nn

    from finetune.interfaces import Towers


def module_at(model: nn.Module, path: str) -> nn.Module:
    """Return the module of ``model`` with this full name; the model itself for an empty one.

    Raises:
        KeyError: there is none.
    """
    module = model
    for part in path.split(".") if path else ():
        child = module._modules[part]
        if child is None:  # torch keeps a place for a module that a config left out
            raise KeyError(path)
        module = child
    return module


def language_head(model: Any) -> nn.Module | None:
    """Return the module that makes logits; None where the model has none, as a dual encoder."""
    try:
        head: nn.Module | None = model.get_output_embeddings()
    except NotImplementedError:
        return None
    return head


def tower_paths(towers: Towers, tower: str) -> tuple[str, ...]:
    """Return the full names of the modules of a tower that a manifest names.

    Raises:
        ManifestError: this base has no such tower.
    """
    if tower not in towers:
        raise ManifestError(
            f"this base has no tower {brief(tower)}, in which the adapter changes modules; it has {', '.join(towers)}"
        )
    return towers[tower]
