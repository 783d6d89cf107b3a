"""Recording the outputs of frozen modules for a row, and replaying stored ones in the forwards of a run."""

from __future__ import annotations

from functools import wraps
from typing import TYPE_CHECKING, Any

from finetune.core.batch import STORED_OUTPUTS
from finetune.core.hollow import hollow

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping, Sequence

    from torch import Tensor, nn

    from finetune.training.boundary import Boundary, FrozenModule

_MARK = "replays_stored_outputs"


def record(model: Any, boundary: Boundary, inputs: Mapping[str, Any]) -> dict[str, tuple[Tensor, ...]]:
    """Run the model on the inputs of one row, up to the boundary.

    Args:
        model: the plain base, in eval mode.
        boundary: the modules whose outputs are recorded.
        inputs: the inputs of the row, on the device of the model.

    Returns:
        The full name of each module that ran -> the tensors of its output. A tensor that no later module reads is
        hollow.

    Raises:
        ModelError: a module's output has another structure than for the row that the boundary was found with.
    """
    found: dict[str, tuple[Tensor, ...]] = {}

    def recorder(module: FrozenModule) -> Callable[..., None]:
        def recorded(_: nn.Module, args: Any, output: Any) -> None:
            tensors = zip(module.indices, module.tensors(output), strict=True)
            found[module.path] = tuple(
                tensor.detach() if i in module.kept else hollow(tensor.shape, tensor.dtype) for i, tensor in tensors
            )
            if module is boundary.modules[-1]:
                raise _Recorded

        return recorded

    handles = [model.get_submodule(one.path).register_forward_hook(recorder(one)) for one in boundary.modules]
    try:
        # Without the hooks of the model itself, which gather and free its shards around a whole forward.
        model.forward(**inputs, use_cache=False)
    except _Recorded:
        pass
    finally:
        for handle in handles:
            handle.remove()
    return found


class _Recorded(Exception):  # noqa: N818
    """The end of a forward at the boundary."""


class Replay:
    """Frozen modules of a model that return their stored outputs wherever a batch holds them.

    A forward without stored outputs runs the modules. This object changes the model until ``remove``.

    Args:
        model: the plain model of a run.
        boundaries: the boundaries whose outputs batches may hold.
    """

    def __init__(self, model: nn.Module, boundaries: Iterable[Boundary]):
        self._stored: Mapping[str, Sequence[Tensor]] = {}
        self._replaced: list[tuple[nn.Module, str, Any]] = []
        self._replace(model, "forward", self._taking(model.forward))
        if callable(
            generate := getattr(model, "generate", None)
        ):  # it computes image features before its first forward
            self._replace(model, "generate", self._taking(generate))
        for module in {module.path: module for boundary in boundaries for module in boundary.modules}.values():
            frozen = model.get_submodule(module.path)
            self._replace(frozen, "forward", self._returning(module, frozen.forward))

    def remove(self) -> None:
        """Give the model and the modules their own functions back."""
        for module, name, before in reversed(self._replaced):
            del vars(module)[name]
            if before is not None:
                vars(module)[name] = before
        self._replaced = []

    def _replace(self, module: nn.Module, name: str, function: Callable[..., Any]) -> None:
        self._replaced.append((module, name, vars(module).get(name)))
        vars(module)[name] = function

    def _taking(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """Return a function of the model with one more argument, the stored outputs of a batch."""

        @wraps(function)
        def taking(*args: Any, **kwargs: Any) -> Any:
            if STORED_OUTPUTS not in kwargs:
                return function(*args, **kwargs)
            before, self._stored = self._stored, kwargs.pop(STORED_OUTPUTS)
            try:
                return function(*args, **kwargs)
            finally:
                self._stored = before

        return taking

    def _returning(self, module: FrozenModule, forward: Callable[..., Any]) -> Callable[..., Any]:
        @wraps(forward)
        def returning(*args: Any, **kwargs: Any) -> Any:
            stored = self._stored.get(module.path)
            return forward(*args, **kwargs) if stored is None else module.output(stored)

        setattr(returning, _MARK, True)
        return returning


def replays(module: nn.Module) -> bool:
    """Return whether a module may return stored outputs."""
    return hasattr(vars(module).get("forward"), _MARK)
