"""The repeated layers of a tower, chosen by the option ``layers`` of a recipe."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

from torch import nn

from finetune.errors import MethodError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from finetune.recipe import Layers


def in_layers(
    names: Sequence[str], model: nn.Module, paths: Sequence[str], layers: Layers | None, key: str
) -> list[str]:
    """Return those of some modules or parameters of a tower that are in the chosen layers, in their order.

    Args:
        names: the full names of the modules or parameters.
        model: the model, which may be on the meta device.
        paths: the full names of the modules of the tower.
        layers: the layers: ``last N``, ``A-B`` with both ends, or a list of numbers from 0; None for the whole tower.
        key: the key of the recipe, for errors.

    Raises:
        MethodError: the tower has no repeated layers, or not all of these.
    """
    if layers is None:
        return [*names]
    found = _repeated(model, paths)
    if not found:
        raise MethodError(f"{key} needs a tower with repeated layers, and this one has none. Leave it out.")
    numbers = _numbers(layers, len(found))
    if not numbers or not 0 <= min(numbers) <= max(numbers) < len(found):
        raise MethodError(
            f"{key} must choose some of the {len(found)} layers of the tower, which have the numbers 0 to "
            f"{len(found) - 1}; got {layers}"
        )
    chosen = tuple(f"{found[number]}." for number in numbers)
    inside = [name for name in names if name.startswith(chosen)]
    if names and not inside:
        raise MethodError(f"{key}: the layers {layers} of the tower hold nothing that can be adapted. Choose others.")
    return inside


def _repeated(model: nn.Module, paths: Sequence[str]) -> list[str]:
    """Return the full names of a tower's layers: the members of its longest list of modules."""
    lists = [
        (name, module)
        for path in paths
        for name, module in model.get_submodule(path).named_modules(prefix=path)
        if isinstance(module, nn.ModuleList)
    ]
    if not lists:
        return []
    path, longest = max(lists, key=lambda found: len(found[1]))  # the outermost of equal length, which comes first
    return [f"{path}.{name}" for name, _ in longest.named_children()]


def _numbers(layers: Layers, count: int) -> Sequence[int]:
    if isinstance(layers, list):
        return layers
    if last := re.fullmatch(r"last (\d+)", layers):
        return range(count - int(last[1]), count)
    first, _, end = layers.partition("-")
    return range(int(first), int(end) + 1)
