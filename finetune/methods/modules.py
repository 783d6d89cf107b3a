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
    module: nn.Module | None = model
    for part in path.split(".") if path else ():
        assert module is not None
        module = module._modules[part]
    if module is None:
        raise KeyError(path)
    return module
