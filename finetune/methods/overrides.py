"""Overrides: whole parameters trained as copies, held per adapter beside the base's own, which are never written."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn

from finetune.errors import ManifestError, MethodError
from finetune.interfaces import Part
from finetune.methods.reach import unreached_parameters
from finetune.methods.targets import is_inside_a_layer

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping

    from torch import Tensor

    from finetune.adapters.manifest import PartDescription
    from finetune.interfaces import Host, Towers
    from finetune.recipe import OverridesSection

_TABLE = "_finetune_overrides"


class Overrides:
    """Full training of the projector, and of the norms of the language tower."""

    def attach(self, host: Host, adapter_name: str, options: OverridesSection) -> Part:
        """Adds copies of the named parameters; outputs do not change.

        Raises:
            MethodError: a kind names no parameter, or LoRA adapts one of the modules already.
        """
        modules: dict[str, list[str]] = {}
        notes: list[str] = []
        copies: dict[str, nn.Parameter] = {}
        for kind in options.parameters:
            originals = _originals(host, kind)
            unused = unreached_parameters(originals, host.forward) if originals else []
            names = [name for name in originals if name not in unused]
            if not names:
                raise MethodError(f"method.parameters: this base has no {kind} to train. Leave {kind!r} out.")
            modules["projector" if kind == "projector" else "language"] = names
            notes += [f"left out, as the forward never uses it: {name}" for name in unused]
            copies |= {name: nn.Parameter(originals[name].detach().float().clone()) for name in names}
        _table(host.model, create=True).add(adapter_name, copies)
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

    def attach_saved(
        self, model: nn.Module, adapter_name: str, description: PartDescription, tensors: Mapping[str, Tensor]
    ) -> None:
        """Adds finished copies."""
        copies = {}
        for name in description.options["parameters"]:
            device = _Place.find(model, name).original.device
            copies[name] = nn.Parameter(tensors[name].to(device, torch.float32), requires_grad=False)
        _table(model, create=True).add(adapter_name, copies)

    def expected_tensors(
        self, model: nn.Module, towers: Towers, description: PartDescription
    ) -> dict[str, tuple[int, ...]]:
        """Returns name -> shape of each parameter.

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
            try:
                place = _Place.find(model, name)
            except (AttributeError, KeyError):
                raise ManifestError(f"this base has no parameter {name!r}, which the adapter replaces") from None
            inside = name.startswith(tuple(f"{path}." for path in getattr(towers, tower)))
            allowed = tower == "projector" or (tower == "language" and _is_norm(place.module))
            if not inside or not allowed or is_inside_a_layer(model, name.rpartition(".")[0]):
                raise ManifestError(f"{name!r} is neither the projector's nor a norm of the language tower")
            expected[name] = tuple(place.original.shape)
        return expected

    def detach(self, model: nn.Module, adapter_name: str) -> None:
        """Removes an adapter's copies; the last one takes the table with it."""
        if (table := _table(model)) is not None:
            table.remove(adapter_name)
            if not table.adapters:
                delattr(model, _TABLE)

    def merge(self, model: nn.Module, adapter_name: str) -> None:
        """Writes the copies into the base's own parameters."""
        table = _table(model)
        if table is None or adapter_name not in table.adapters:
            return
        copies = table.adapters[adapter_name]
        self.detach(model, adapter_name)
        with torch.no_grad():
            for place, copy in copies:
                place.original.copy_(copy)

    def switch(self, model: nn.Module) -> Callable[[str | None], None] | None:
        """Returns what puts one adapter's copies, or the base's own parameters, in their places."""
        table = _table(model)
        return None if table is None else table.use


class _Place:
    """Where a parameter stands: the module that holds it, its name there, and the base's own tensor."""

    def __init__(self, module: nn.Module, leaf: str, original: nn.Parameter):
        self.module, self.leaf, self.original = module, leaf, original

    @classmethod
    def find(cls, model: nn.Module, name: str) -> _Place:
        path, _, leaf = name.rpartition(".")
        module = model.get_submodule(path)
        if isinstance(module, BaseTunerLayer):
            module = module.get_base_layer()
        table = _table(model)
        for place, _ in (pair for pairs in (table.adapters.values() if table else ()) for pair in pairs):
            if place.module is module and place.leaf == leaf:
                return place
        original = module._parameters[leaf]
        if original is None:
            raise KeyError(leaf)
        return cls(module, leaf, original)


class OverrideTable:
    """The copies of each adapter, and which of them stand in the model now.

    What stands in the model is what ``state_dict`` shows and ``to`` moves: switch to the plain base before saving or
    moving it.
    """

    def __init__(self, model: nn.Module):
        self.model = model
        self.adapters: dict[str, list[tuple[_Place, nn.Parameter]]] = {}
        self._in_place: list[tuple[_Place, nn.Parameter]] = []
        self._handles: list[Any] = []

    def add(self, name: str, copies: Mapping[str, nn.Parameter]) -> None:
        """Adds an adapter's copies and puts them in their places."""
        self.adapters[name] = [(_Place.find(self.model, parameter), copy) for parameter, copy in copies.items()]
        self.use(name)

    def remove(self, name: str) -> None:
        """Removes an adapter's copies; where they were in place, the base's own are again."""
        pairs = self.adapters.get(name)
        if pairs is not None and self._in_place is pairs:
            self.use(None)
        self.adapters.pop(name, None)

    def use(self, name: str | None) -> None:
        """Puts the copies of ``name`` in place; an adapter that has none leaves the base's own."""
        for place, _ in self._in_place:
            place.module._parameters[place.leaf] = place.original
        for handle in self._handles:
            handle.remove()
        self._handles = []
        self._in_place = self.adapters.get(name, []) if name is not None else []
        for place, copy in self._in_place:
            place.module._parameters[place.leaf] = copy
        if any(copy.dtype != place.original.dtype for place, copy in self._in_place):
            self._handles = list(self._casting())

    def _casting(self) -> Iterator[Any]:
        """Yields hooks by which copies in fp32 compute in the half precision of the base, and still train in fp32."""
        by_module: dict[nn.Module, list[tuple[_Place, nn.Parameter]]] = {}
        for place, copy in self._in_place:
            by_module.setdefault(place.module, []).append((place, copy))
        for module, pairs in by_module.items():

            def cast(module: nn.Module, args: Any, pairs: Any = pairs) -> None:
                for place, copy in pairs:
                    module._parameters[place.leaf] = copy.to(place.original.dtype)

            def restore(module: nn.Module, args: Any, output: Any, pairs: Any = pairs) -> None:
                for place, copy in pairs:
                    module._parameters[place.leaf] = copy

            yield module.register_forward_pre_hook(cast)
            yield module.register_forward_hook(restore, always_call=True)


def _table(model: nn.Module, *, create: bool = False) -> Any:
    if create and not hasattr(model, _TABLE):
        object.__setattr__(model, _TABLE, OverrideTable(model))
    return getattr(model, _TABLE, None)


def _originals(host: Host, kind: str) -> dict[str, nn.Parameter]:
    """Returns the base's own parameters of one kind, by full name."""
    originals: dict[str, nn.Parameter] = {}
    for path in host.towers.projector if kind == "projector" else host.towers.language:
        for name, module in host.model.get_submodule(path).named_modules(prefix=path):
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
    """Tells whether a module normalises by the values of its input alone: a batch norm's statistics are the base's."""
    return "norm" in type(module).__name__.lower() and not isinstance(module, nn.modules.batchnorm._BatchNorm)
