"""Copies of whole parameters, trained and finished; the base's own parameters are never written.

While they train the copies stand in the places of the base's own; finished, a stand-in for each module computes with
them, so that any number of threads may each use others.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from finetune.core.matmul import speed_up
from finetune.errors import MethodError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping

    from torch import Tensor, nn


class CopiesMethod:
    """The base class of methods that train copies of parameters in the places of the base's own.

    Attributes:
        trained: the attribute of the model that keeps the copies while they train.
    """

    trained: str

    def put(self, model: nn.Module, copies: Mapping[str, nn.Parameter]) -> None:
        """Put copies, by the full names of parameters, into their places.

        Raises:
            MethodError: a copy of another method stands in one of them.
        """
        others = [value for value in vars(model).values() if isinstance(value, TrainedCopies)]
        if twice := sorted(copies.keys() & {name for other in others for name in other.names}):
            raise MethodError(
                f"{twice[0]} is trained by two methods of the adapter. Leave one of them out of method, or take a task "
                "without a head."
            )
        object.__setattr__(model, self.trained, TrainedCopies(model, copies))
        self.switch(model, True)

    def detach(self, model: nn.Module) -> None:
        """Remove the copies; do nothing where there are none."""
        if self.is_attached(model):
            self.switch(model, False)
            delattr(model, self.trained)

    def is_attached(self, model: nn.Module) -> bool:
        """Return whether copies train here."""
        return hasattr(model, self.trained)

    def switch(self, model: nn.Module, on: bool) -> None:
        """Put the copies, or the base's own parameters, in their places; do nothing where there are no copies."""
        if self.is_attached(model):
            getattr(model, self.trained).switch(on)


def by_module(tensors: Mapping[str, Tensor]) -> dict[str, dict[str, Tensor]]:
    """Return full name of a module -> its tensors by the names of its parameters."""
    found: dict[str, dict[str, Tensor]] = {}
    for name, tensor in tensors.items():
        path, _, leaf = name.rpartition(".")
        found.setdefault(path, {})[leaf] = tensor
    return found


class CopiesUpdate:
    """A finished module whose parameters are copies; the base's own parameters are never written.

    Args:
        module: the base's own module.
        copies: each name of a parameter of the module -> the copy that replaces it.
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
        """Bytes of the tensors that the update holds beside the base."""
        return sum(copy.nbytes for copy in self.copies.values())

    def __call__(self, inner: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Return the output of the module with the copies."""
        return self._stand_in.forward(*args, **kwargs)

    def merging(self, name: str) -> Callable[[], None]:
        """Return the function that writes the copies into the base's own parameters."""
        own: Any = self.module._parameters

        def write() -> None:
            for leaf, copy in self.copies.items():
                own[leaf].copy_(copy)

        return write


class _Place:
    """The place of a copy: the module, the parameter's name there, and the base's own parameter."""

    def __init__(self, model: nn.Module, name: str):
        path, _, self.leaf = name.rpartition(".")
        self.module = model.get_submodule(path)
        self.original: Any = self.module._parameters[self.leaf]


class TrainedCopies:
    """The copies that train, and the switch between them and the base's own parameters.

    What stands in the model is what ``state_dict`` shows and ``to`` moves: switch to the plain base before saving or
    moving it.
    """

    def __init__(self, model: nn.Module, copies: Mapping[str, nn.Parameter]):
        self.names = tuple(copies)
        self._pairs = [(_Place(model, name), copy) for name, copy in copies.items()]
        self._handles: list[Any] = []

    def switch(self, on: bool) -> None:
        """Put the copies, or the base's own parameters, in their places."""
        for place, copy in self._pairs:
            place.module._parameters[place.leaf] = copy if on else place.original
        for handle in self._handles:
            handle.remove()
        casts = on and any(copy.dtype != place.original.dtype for place, copy in self._pairs)
        self._handles = list(self._casting()) if casts else []

    def _casting(self) -> Iterator[Any]:
        """Yield hooks by which copies in fp32 compute in the half precision of the base, and still train in fp32."""
        of_module: dict[nn.Module, list[tuple[_Place, nn.Parameter]]] = {}
        for place, copy in self._pairs:
            of_module.setdefault(place.module, []).append((place, copy))
        for module, pairs in of_module.items():

            def cast(module: nn.Module, args: Any, pairs: Any = pairs) -> None:
                for place, copy in pairs:
                    module._parameters[place.leaf] = copy.to(place.original.dtype)

            def restore(module: nn.Module, args: Any, output: Any, pairs: Any = pairs) -> None:
                for place, copy in pairs:
                    module._parameters[place.leaf] = copy

            yield module.register_forward_pre_hook(cast)
            yield module.register_forward_hook(restore, always_call=True)
