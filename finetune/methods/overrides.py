"""Overrides: the whole projector, and the norms of the language tower, trained as copies of the base's own."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn

from finetune.errors import ManifestError, MethodError
from finetune.interfaces import Part
from finetune.methods.copies import CopiesMethod, CopiesUpdate, by_module
from finetune.methods.modules import module_at, tower_paths
from finetune.methods.reach import unreached_parameters

if TYPE_CHECKING:
    from collections.abc import Collection, Mapping

    from torch import Tensor

    from finetune.adapters.manifest import PartDescription
    from finetune.interfaces import Host, Towers, Update
    from finetune.recipe import OverridesSection


class Overrides(CopiesMethod):
    """Full training of the projector, and of the norms of the language tower."""

    trained = "_finetune_copies"

    def attach(self, host: Host, options: OverridesSection) -> Part:
        """Add copies of the named parameters; outputs do not change.

        Raises:
            MethodError: a kind names no parameter, or LoRA adapts one of the modules already.
        """
        modules: dict[str, list[str]] = {}
        notes: list[str] = []
        copies: dict[str, nn.Parameter] = {}
        for kind in options.parameters:
            originals = _originals(host.model, host.towers, kind)
            unused = unreached_parameters(originals, host.forward) if originals else []
            names = [name for name in originals if name not in unused]
            _require(names, kind)
            modules["projector" if kind == "projector" else "language"] = names
            notes += [f"left out, as the forward never uses it: {name}" for name in unused]
            copies |= {name: nn.Parameter(originals[name].detach().float().clone()) for name in names}
        self.put(host.model, copies)
        return Part(
            method="overrides",
            options={"parameters": list(copies)},
            modules=modules,
            parameters=copies,
            alive_after=dict.fromkeys(copies, 1),
            learning_rates=dict.fromkeys(copies, options.lr_ratio) if options.lr_ratio != 1 else {},
            unit="parameters",
            notes=tuple(notes),
        )

    def check(self, model: nn.Module, towers: Towers, options: OverridesSection) -> None:
        """Raise MethodError where a kind names no parameter."""
        for kind in options.parameters:
            _require(_originals(model, towers, kind), kind)

    def expected_tensors(
        self, model: nn.Module, towers: Towers, description: PartDescription
    ) -> dict[str, tuple[int, ...]]:
        """Return name -> shape of each parameter.

        Raises:
            ManifestError: one is missing on this base, or is neither the projector's nor a norm's.
        """
        parameters = description.options.get("parameters")
        if set(description.options) != {"parameters"} or not isinstance(parameters, list) or not parameters:
            raise ManifestError("the options of overrides are a list of parameters")
        if sorted(map(str, parameters)) != sorted(description.names):
            raise ManifestError("the parameters of overrides are not those that their modules name")
        expected = {}
        for tower, name in description.places:
            path, _, leaf = name.rpartition(".")
            try:
                module = module_at(model, path)
                original: Any = module._parameters[leaf]
                shape = tuple(original.shape)
            except (AttributeError, KeyError):
                raise ManifestError(f"this base has no parameter {name!r}, which the adapter replaces") from None
            inside = name.startswith(tuple(f"{path}." for path in tower_paths(towers, tower)))
            allowed = tower == "projector" or (tower == "language" and _is_norm(module))
            if not inside or not allowed:
                raise ManifestError(f"{name!r} is neither the projector's nor a norm of the language tower")
            expected[name] = shape
        return expected

    def updates(
        self, model: nn.Module, description: PartDescription, tensors: Mapping[str, Tensor]
    ) -> dict[str, Update]:
        """Return full module name -> the update of each module that has finished copies."""
        copies = by_module({name: tensors[name] for name in description.options["parameters"]})
        return {path: CopiesUpdate(module_at(model, path), own) for path, own in copies.items()}


def _require(names: Collection[str], kind: str) -> None:
    if not names:
        raise MethodError(f"method.parameters: this base has no {kind} to train. Leave {kind!r} out.")


def _originals(model: nn.Module, towers: Towers, kind: str) -> dict[str, nn.Parameter]:
    """Return the base's own parameters of one kind, by full name."""
    originals: dict[str, nn.Parameter] = {}
    for path in towers.get("projector" if kind == "projector" else "language", ()):
        for name, module in model.get_submodule(path).named_modules(prefix=path):
            if isinstance(module, BaseTunerLayer) and kind == "projector":
                raise MethodError(
                    f"{name} is adapted by LoRA and cannot be trained as a whole too. Set "
                    "method.towers.projector: none, or leave 'projector' out of the overrides."
                )
            if kind == "projector" and not isinstance(module, nn.modules.batchnorm._BatchNorm) or _is_norm(module):
                originals |= {f"{name}.{leaf}": p for leaf, p in module.named_parameters(recurse=False)}
    if quantized := next((name for name, p in originals.items() if not p.is_floating_point()), None):
        raise MethodError(f"{quantized} is quantized, so it cannot be trained as a whole")
    return originals


def _is_norm(module: nn.Module) -> bool:
    """Return whether a module normalises by the values of its input alone: a batch norm's statistics are the base's."""
    return "norm" in type(module).__name__.lower() and not isinstance(module, nn.modules.batchnorm._BatchNorm)
