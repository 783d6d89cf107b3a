"""Overrides: whole parameters trained as copies, held per adapter beside the base's own, which are never written.

While they train the copies stand in the places of the base's own; finished, a stand-in for each module computes with
them, so that any number of threads may each use others.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn

from finetune.errors import ManifestError, MethodError
from finetune.interfaces import Part
from finetune.matmul import speed_up
from finetune.methods.modules import module_at, tower_paths
from finetune.methods.reach import unreached_parameters

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Iterator, Mapping

    from torch import Tensor

    from finetune.adapters.manifest import PartDescription
    from finetune.interfaces import Host, Towers, Update
    from finetune.recipe import OverridesSection

_TRAINED = "_finetune_copies"  # on the model, while they train


class Overrides:
    """Full training of the projector, and of the norms of the language tower."""

    def attach(self, host: Host, options: OverridesSection) -> Part:
        """Adds copies of the named parameters; outputs do not change.

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
        object.__setattr__(host.model, _TRAINED, TrainedCopies(host.model, copies))
        self.switch(host.model, True)
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

    def detach(self, model: nn.Module) -> None:
        """Removes the copies."""
        if self.is_attached(model):
            self.switch(model, False)
            delattr(model, _TRAINED)

    def is_attached(self, model: nn.Module) -> bool:
        """Tells whether copies train here."""
        return hasattr(model, _TRAINED)

    def switch(self, model: nn.Module, on: bool) -> None:
        """Puts the copies, or the base's own parameters, in their places."""
        if self.is_attached(model):
            getattr(model, _TRAINED).switch(on)

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
        """Returns what computes with finished copies in the place of each module that holds some."""
        by_module: dict[str, dict[str, Tensor]] = {}
        for name in description.options["parameters"]:
            path, _, leaf = name.rpartition(".")
            by_module.setdefault(path, {})[leaf] = tensors[name]
        return {path: OverrideUpdate(module_at(model, path), copies) for path, copies in by_module.items()}


class OverrideUpdate:
    """A module with other parameters, beside the base's own, which is never written.

    Args:
        module: the base's own.
        copies: name of a parameter of the module -> what stands for it.
    """

    def __init__(self, module: nn.Module, copies: Mapping[str, Tensor]):
        self.module = module
        own: Any = module._parameters
        # Trained in fp32, computed with in the base's precision.
        self.copies = {leaf: copy.to(own[leaf].device, own[leaf].dtype) for leaf, copy in copies.items()}
        # Of the same class and with the same children: only what it looks up as its parameters is another.
        self._stand_in: nn.Module = object.__new__(type(module))
        vars(self._stand_in).update(vars(module), _parameters={**own, **self.copies})
        vars(self._stand_in).pop("forward", None)
        speed_up([self._stand_in])

    @property
    def num_bytes(self) -> int:
        """Bytes held."""
        return sum(copy.nbytes for copy in self.copies.values())

    def __call__(self, inner: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Returns what the module computes with the copies."""
        return self._stand_in.forward(*args, **kwargs)

    def merging(self, name: str) -> Callable[[], None]:
        """Returns what writes the copies into the base's own parameters."""
        own: Any = self.module._parameters

        def write() -> None:
            for leaf, copy in self.copies.items():
                own[leaf].copy_(copy)

        return write


class _Place:
    """Where a copy stands: the module, the parameter's name there, and the base's own."""

    def __init__(self, model: nn.Module, name: str):
        path, _, self.leaf = name.rpartition(".")
        self.module = model.get_submodule(path)
        self.original: Any = self.module._parameters[self.leaf]


class TrainedCopies:
    """The copies that train, and whether they or the base's own parameters stand in the model now.

    What stands in the model is what ``state_dict`` shows and ``to`` moves: switch to the plain base before saving or
    moving it.
    """

    def __init__(self, model: nn.Module, copies: Mapping[str, nn.Parameter]):
        self._pairs = [(_Place(model, name), copy) for name, copy in copies.items()]
        self._handles: list[Any] = []

    def switch(self, on: bool) -> None:
        """Puts the copies, or the base's own parameters, in their places."""
        for place, copy in self._pairs:
            place.module._parameters[place.leaf] = copy if on else place.original
        for handle in self._handles:
            handle.remove()
        casts = on and any(copy.dtype != place.original.dtype for place, copy in self._pairs)
        self._handles = list(self._casting()) if casts else []

    def _casting(self) -> Iterator[Any]:
        """Yields hooks by which copies in fp32 compute in the half precision of the base, and still train in fp32."""
        by_module: dict[nn.Module, list[tuple[_Place, nn.Parameter]]] = {}
        for place, copy in self._pairs:
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


def _require(names: Collection[str], kind: str) -> None:
    if not names:
        raise MethodError(f"method.parameters: this base has no {kind} to train. Leave {kind!r} out.")


def _originals(model: nn.Module, towers: Towers, kind: str) -> dict[str, nn.Parameter]:
    """Returns the base's own parameters of one kind, by full name."""
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
    """Tells whether a module normalises by the values of its input alone: a batch norm's statistics are the base's."""
    return "norm" in type(module).__name__.lower() and not isinstance(module, nn.modules.batchnorm._BatchNorm)
