"""Copies of whole parameters, in training and finished; the base's own parameters are never written.

In training, the copies replace the base's parameters. When finished, a stand-in for each module computes with them, so
threads may use different adapters at the same time.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from finetune.core.matmul import speed_up
from finetune.errors import MethodError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping

    from torch import Tensor, nn


class CopiesMethod:
    """The base class of methods that train copies in place of the base's parameters.

    Attributes:
        trained: the name of the model's attribute that holds the copies in training.
    """

    trained: str

    def put(self, model: nn.Module, copies: Mapping[str, nn.Parameter]) -> None:
        """Replace the base's parameters, given by full names, with copies.

        Raises:
            MethodError: another method already replaces one of them.
        """
        others = [value for value in vars(model).values() if isinstance(value, TrainedCopies)]
        if twice := sorted(copies.keys() & {name for other in others for name in other.names}):
            raise MethodError(
                f"each parameter must be trained by one method, but two methods train {twice[0]}. Remove one of them "
                "from method, or choose a task without a head."
            )
        object.__setattr__(model, self.trained, TrainedCopies(model, copies))
        self.switch(model, True)

    def detach(self, model: nn.Module) -> None:
        """Remove the copies, if there are any."""
        if self.is_attached(model):
            self.switch(model, False)
            delattr(model, self.trained)

    def is_attached(self, model: nn.Module) -> bool:
        """Return whether the model has copies in training."""
        return hasattr(model, self.trained)

    def switch(self, model: nn.Module, on: bool) -> None:
        """Switch to the copies, or back to the base's own parameters; without copies, do nothing."""
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
        # The same class and the same children, with other parameters.
        self._stand_in: nn.Module = object.__new__(type(module))
        vars(self._stand_in).update(vars(module), _parameters={**own, **self.copies})
        vars(self._stand_in).pop("forward", None)
        speed_up([self._stand_in])

    @property
    def num_bytes(self) -> int:
        """Return the bytes of the tensors that the update holds beside the base."""
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

    ``state_dict`` shows, and ``to`` moves, the parameters that are active: switch to the plain base before you save or
    move it.
    """

    def __init__(self, model: nn.Module, copies: Mapping[str, nn.Parameter]):
        self.names = tuple(copies)
        self._pairs = [(_Place(model, name), copy) for name, copy in copies.items()]
        self._handles: list[Any] = []

    def switch(self, on: bool) -> None:
        """Switch to the copies, or back to the base's own parameters."""
        for place, copy in self._pairs:
            place.module._parameters[place.leaf] = copy if on else place.original
        for handle in self._handles:
            handle.remove()
        casts = on and any(copy.dtype != place.original.dtype for place, copy in self._pairs)
        self._handles = list(self._casting()) if casts else []

    def _casting(self) -> Iterator[Any]:
        """Yield hooks that cast fp32 copies to the half precision of the base in forward; they still train in fp32."""
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
