"""Full training of copies of the projector, and of the norms of the language tower."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from torch import nn

from finetune.errors import ManifestError, MethodError, brief
from finetune.interfaces import Part
from finetune.methods.copies import CopiesMethod, CopiesUpdate, by_module
from finetune.methods.layers import in_layers
from finetune.methods.modules import module_at, tower_paths
from finetune.methods.peft_layers import is_peft_layer
from finetune.methods.reach import unreached_parameters

if TYPE_CHECKING:
    from collections.abc import Collection, Mapping

    from torch import Tensor

    from finetune.adapters.manifest import PartDescription
    from finetune.interfaces import Host, Towers, Update
    from finetune.recipe import FullModulesSection


class FullModules(CopiesMethod):
    """Full training of the projector, and of the norms of the language tower.

    PEFT's ``modules_to_save`` keeps a copy of a whole module, of any kind. This method keeps a table of parameters and
    refuses all others, so that an adapter cannot replace the head or the embeddings of a base.
    """

    trained = "_finetune_copies"

    def attach(self, host: Host, options: FullModulesSection) -> Part:
        """Add copies of the named parameters; outputs do not change.

        Raises:
            MethodError: a name in ``parameters`` matches no parameter of the base, or LoRA already adapts one of the
                modules.
        """
        modules: dict[str, list[str]] = {}
        notes: list[str] = []
        copies: dict[str, nn.Parameter] = {}
        for group in options.parameters:
            originals = _originals(host.model, host.towers, group, options)
            unused = unreached_parameters(host, originals) if originals else []
            names = [name for name in originals if name not in unused]
            _require(names, group)
            modules["projector" if group == "projector" else "language"] = names
            notes += [f"left out, because the forward does not use it: {name}" for name in unused]
            copies |= {name: nn.Parameter(originals[name].detach().float().clone()) for name in names}
        self.put(host.model, copies)
        return Part(
            method="full_modules",
            options={"parameters": list(copies)},
            modules=modules,
            parameters=copies,
            alive_after=dict.fromkeys(copies, 1),
            learning_rates=dict.fromkeys(copies, options.lr_ratio) if options.lr_ratio != 1 else {},
            unit="parameters",
            notes=tuple(notes),
        )

    def check(self, model: nn.Module, towers: Towers, options: FullModulesSection) -> None:
        """Raise MethodError if a name in ``parameters`` matches no parameter of the base."""
        for group in options.parameters:
            _require(_originals(model, towers, group, options), group)

    def expected_tensors(
        self, model: nn.Module, towers: Towers, description: PartDescription
    ) -> dict[str, tuple[int, ...]]:
        """Return name -> shape of each parameter.

        Raises:
            ManifestError: the base lacks a parameter, or it belongs to neither the projector nor a norm.
        """
        parameters = description.options.get("parameters")
        if set(description.options) != {"parameters"} or not isinstance(parameters, list) or not parameters:
            raise ManifestError(
                f"the options of full_modules must be a non-empty list, parameters; got {brief(description.options)}"
            )
        if sorted(map(str, parameters)) != sorted(description.names):
            raise ManifestError(
                f"the parameters of full_modules must be those that their modules list, got {brief(parameters)}"
            )
        expected = {}
        for tower, name in description.places:
            path, _, leaf = name.rpartition(".")
            try:
                module = module_at(model, path)
                original: Any = module._parameters[leaf]
                shape = tuple(original.shape)
            except (AttributeError, KeyError):
                raise ManifestError(
                    f"this base has no parameter {name!r}, which the adapter replaces. Load the base of the training."
                ) from None
            inside = name.startswith(tuple(f"{path}." for path in tower_paths(towers, tower)))
            allowed = tower == "projector" or (tower == "language" and _is_norm(module))
            if not inside or not allowed:
                raise ManifestError(
                    f"full_modules must be of the projector or of norms of the language tower, got {name!r}"
                )
            expected[name] = shape
        return expected

    def updates(
        self, model: nn.Module, description: PartDescription, tensors: Mapping[str, Tensor]
    ) -> dict[str, Update]:
        """Return full module name -> the update of each module that has finished copies."""
        copies = by_module({name: tensors[name] for name in description.options["parameters"]})
        return {path: CopiesUpdate(module_at(model, path), own) for path, own in copies.items()}


def _require(names: Collection[str], group: str) -> None:
    if not names:
        raise MethodError(f"method.parameters: this base has no {group} to train. Remove {group!r}.")


def _originals(model: nn.Module, towers: Towers, group: str, options: FullModulesSection) -> dict[str, nn.Parameter]:
    """Return the base's own parameters of one group, by full name."""
    originals: dict[str, nn.Parameter] = {}
    paths = towers.get("projector" if group == "projector" else "language", ())
    for path in paths:
        for name, module in model.get_submodule(path).named_modules(prefix=path):
            if is_peft_layer(module) and group == "projector":
                raise MethodError(
                    f"LoRA adapts {name}, so full_modules cannot train it too. Set "
                    "method.towers.projector: none, or remove 'projector' from full_modules."
                )
            if group == "projector" and not isinstance(module, nn.modules.batchnorm._BatchNorm) or _is_norm(module):
                originals |= {f"{name}.{leaf}": p for leaf, p in module.named_parameters(recurse=False)}
    if group == "norms":
        chosen = in_layers([*originals], model, paths, options.layers, "method.layers")
        originals = {name: originals[name] for name in chosen}
    if quantized := next((name for name, p in originals.items() if not p.is_floating_point()), None):
        raise MethodError(
            f"method.parameters: {quantized} is quantized and cannot be trained in full. Load the base without "
            "quantization."
        )
    return originals


def _is_norm(module: nn.Module) -> bool:
    """Return whether a module normalises by its input alone, unlike a batch norm, which has statistics of its own."""
    return "norm" in type(module).__name__.lower() and not isinstance(module, nn.modules.batchnorm._BatchNorm)
