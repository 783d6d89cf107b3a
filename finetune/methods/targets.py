"""The modules that a method adapts: the names in the recipe, resolved to full module paths."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import nn

from finetune.errors import MethodError
from finetune.lookup import did_you_mean
from finetune.methods.layers import in_layers
from finetune.methods.reach import unreached

if TYPE_CHECKING:
    from finetune.interfaces import Host, Towers
    from finetune.recipe import TowerTarget, TowerTargets


def resolve_targets(host: Host, wanted: TowerTargets) -> tuple[dict[str, list[str]], list[str]]:
    """Return tower -> full names of the linear modules to adapt, in the model's order, and notes for the user.

    Modules that the forward never uses are left out, and so are experts that are not linear modules. Notes list both.

    Raises:
        MethodError: the base lacks a tower, or a tower, or one of the names given for it, matches nothing.
    """
    model = host.model
    resolved = named_targets(model, host.towers, wanted)
    unused = set(unreached(host, [name for names in resolved.values() for name in names]))
    notes = [f"left out, because the forward does not use it: {name}" for name in sorted(unused)]
    notes += [
        f"no {tower} tower: this base has {', '.join(host.towers)}"
        for tower, target in wanted
        if tower not in host.towers and target.target_modules != "none"
    ]
    for tower, names in resolved.items():
        notes += [
            f"stays frozen, because it is not a linear module: {name}" for name in _experts(model, host.towers[tower])
        ]
        if names and not set(names) - unused:
            raise MethodError(
                f"method.towers.{tower}: the forward uses none of its {len(names)} linear modules. Set "
                f"method.towers.{tower}: none."
            )
        resolved[tower] = [name for name in names if name not in unused]
    return resolved, notes


def named_targets(model: nn.Module, towers: Towers, wanted: TowerTargets) -> dict[str, list[str]]:
    """Return tower -> full names of the linear modules in the recipe, even those that the forward does not use.

    This reads only names, so the model may be on the meta device.

    Raises:
        MethodError: the base lacks a tower, or a tower, or one of the names given for it, matches nothing.
    """
    if reason := wanted.why_not(towers):
        raise MethodError(f"method.towers{reason}")
    targets = {tower: wanted.of(tower) for tower in towers}
    return {
        tower: _in_tower(model, tower, towers[tower], target)
        for tower, target in targets.items()
        if target.target_modules != "none"
    }


def _in_tower(model: nn.Module, tower: str, paths: tuple[str, ...], target: TowerTarget) -> list[str]:
    linears = [
        name
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and any(name == p or name.startswith(f"{p}.") for p in paths)
    ]
    if not linears:
        kinds = sorted({type(m).__name__ for p in paths for m in model.get_submodule(p).modules()})
        raise MethodError(
            f"method.towers.{tower}: the {tower} tower has no linear module, so LoRA cannot adapt it "
            f"(it is made of {', '.join(kinds[:8]) or 'nothing'}). Set method.towers.{tower}: none."
        )
    linears = in_layers(linears, model, paths, target.layers, f"method.towers.{tower}.layers")
    if target.target_modules == "all-linear":
        return linears
    chosen: set[str] = set()
    endings = sorted({name.rpartition(".")[2] for name in linears})
    for wanted in target.target_modules:
        matches = [name for name in linears if name == wanted or name.endswith(f".{wanted}")]
        if not matches:
            raise MethodError(
                f"method.towers.{tower}: {wanted!r} matches no linear module of the {tower} tower."
                f"{did_you_mean(wanted, endings)} Its modules are: {', '.join(endings)}."
            )
        chosen.update(matches)
    return [name for name in linears if name in chosen]


def _experts(model: nn.Module, paths: tuple[str, ...]) -> list[str]:
    """Return the weights of mixture-of-experts layers that are one tensor [experts, in, out]."""
    return [
        f"{path}.{name}"
        for path in paths
        for name, parameter in model.get_submodule(path).named_parameters()
        if parameter.ndim == 3 and "expert" in name
    ]
