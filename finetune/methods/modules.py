"""A module by its full name, found without the detours of ``get_submodule``: a load asks for hundreds."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import nn


def module_at(model: nn.Module, path: str) -> nn.Module:
    """Returns the module of ``model`` with this full name; the model itself for an empty one.

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
