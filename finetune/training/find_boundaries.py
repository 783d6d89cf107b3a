"""The search for the frozen modules below the adapter, in one forward of one row.

The graph that autograd builds for this forward shows, for the output of each module, whether it depends on pixels, on
tokens, and on parameters that train. It also shows which of these outputs the rest of the model reads. So an adapter
of any method may begin anywhere: in the language tower, the projector, or a layer of the vision tower.
"""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import get_gradient_edge
from torch.utils._pytree import TreeSpec, tree_flatten

from finetune.errors import ModelError
from finetune.training.boundary import Boundaries, Boundary, FrozenModule

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence

    from torch.autograd.graph import GradientEdge, Node

_PIXELS, _TOKENS, _TRAINED = 1, 2, 4  # bits: what a value depends on
_LEAST = 0.1  # of the parameters that read images; below this share, storing outputs is not worth it


def find_boundaries(
    model: nn.Module,
    plain: Collection[str],
    inputs: Mapping[str, Any],
    forward: Callable[[Mapping[str, Any]], Tensor],
) -> Boundaries:
    """Return the boundaries of a model with an attached adapter.

    Args:
        model: the model; each of its parameters that trains requires a gradient, and no other does.
        plain: the full names of the base's own modules; those of the adapter are never stored.
        inputs: the inputs of a row with an image, on the device of the model.
        forward: the function that returns the outputs of the model for inputs.

    Raises:
        ModelError: the model has no such modules, or too few to be worth it; the message says why.
    """
    trace = _Trace(model, plain, inputs, forward)
    images = trace.boundary(_PIXELS)
    share = trace.parameters(images.modules) / max(1, trace.parameters_that_read_pixels)
    if share < _LEAST:
        raise ModelError(
            f"the adapter begins near the first layer of the vision tower: only {share:.0%} of it is before the adapter"
        )
    rows = trace.boundary(_PIXELS | _TOKENS) if trace.has_frozen_layers else None
    return Boundaries(images=images, rows=rows)


class _Trace:
    """One forward with a graph, and what the output of each module depends on."""

    def __init__(
        self,
        model: nn.Module,
        plain: Collection[str],
        inputs: Mapping[str, Any],
        forward: Callable[[Mapping[str, Any]], Tensor],
    ):
        self.model, self._plain = model, frozenset(plain)
        self._blocks = {
            f"{path}.{name}" if path else name
            for path, module in model.named_modules()
            if isinstance(module, nn.ModuleList)
            for name, _ in module.named_children()
        }
        self._calls: Counter[str] = Counter()
        self._outputs: dict[str, tuple[list[Any], TreeSpec]] = {}  # in the order in which the calls end
        self._leaves: dict[int, int] = {}  # id of a leaf of the graph -> what it is
        self._held: list[Tensor] = []  # these leaves, so that no other tensor gets the id of one
        with torch.enable_grad():
            leaf_inputs = self._leaf_inputs(inputs)
            handles = [*self._hooks()]
            try:
                self.result = forward(leaf_inputs)
            finally:
                for handle in handles:
                    handle.remove()
        if not self.result.requires_grad:
            raise ModelError("no output of the model depends on the adapter, on tokens or on pixels")
        self._known: dict[Node, int] = {}
        self.depends = {path: self._of_entries(entries) for path, (entries, _) in self._outputs.items()}

    def boundary(self, content: int) -> Boundary:
        """Return the outermost frozen modules whose outputs depend on ``content`` and nothing else."""
        paths = [path for path in self._outputs if self._is_frozen(path, content)]
        outermost = [path for path in paths if not any(path.startswith(f"{other}.") for other in paths)]
        if not outermost:
            raise ModelError("no frozen module reads the images before the adapter does")
        edges = {
            _key(edge): (path, i)
            for path in reversed(outermost)
            for i, edge in reversed(list(_edges(self._outputs[path][0])))
        }
        read = self._read(edges)
        modules = tuple(self._module(path, frozenset(i for owner, i in read if owner == path)) for path in outermost)
        return Boundary(modules=modules)

    @property
    def has_frozen_layers(self) -> bool:
        """Return whether a whole layer that depends on tokens is before the adapter."""
        return any(self.depends[path] & _TOKENS and self._is_frozen(path, _PIXELS | _TOKENS) for path in self._outputs)

    def parameters(self, modules: Iterable[FrozenModule]) -> int:
        """Return the number of parameters of modules."""
        return sum(p.numel() for module in modules for p in self.model.get_submodule(module.path).parameters())

    @property
    def parameters_that_read_pixels(self) -> int:
        """The number of parameters of all modules whose outputs depend on pixels but on no tokens."""
        paths = [path for path, bits in self.depends.items() if bits & _PIXELS and not bits & _TOKENS]
        found = {id(p): p.numel() for path in paths for p in self.model.get_submodule(path).parameters()}
        return sum(found.values())

    def _leaf_inputs(self, inputs: Mapping[str, Any]) -> dict[str, Any]:
        """Return the inputs with leaves of the graph in the place of pixels."""
        made = dict(inputs)
        for name, value in inputs.items():
            if name.startswith("pixel_") and value.is_floating_point():
                made[name] = self._leaf(value.clone(), _PIXELS)
        return made

    def _leaf(self, value: Tensor, kind: int) -> Tensor:
        leaf = value.detach().requires_grad_()
        self._leaves[id(leaf)] = kind
        self._held.append(leaf)
        return leaf

    def _hooks(self) -> Iterator[Any]:
        def embedded(module: nn.Module, args: Any, output: Tensor) -> Tensor:
            return self._leaf(output, _TOKENS) * 1  # models write the features of images into it

        # Before the hooks of a tuned prompt, which puts rows that train into the embeddings.
        embedding: Any = self.model.get_input_embeddings()  # type: ignore[operator]
        yield embedding.register_forward_hook(embedded, prepend=True)
        for path, module in self.model.named_modules():
            if path and path in self._plain:
                yield module.register_forward_hook(self._recorder(path))

    def _recorder(self, path: str) -> Callable[..., None]:
        def record(module: nn.Module, args: Any, output: Any) -> None:
            self._calls[path] += 1
            self._outputs[path] = tree_flatten(output)

        return record

    def _is_frozen(self, path: str, content: int) -> bool:
        """Return whether a module's output may be stored.

        Inside a layer that trains nothing is stored: the first norm of the layer is frozen too, but its output is as
        large as the layer's input. Of the language tower, only whole layers are stored.
        """
        bits = self.depends[path]
        if self._calls[path] != 1 or not bits or bits & ~content:
            return False
        if bits & _TOKENS and path not in self._blocks:
            return False
        outer = [block for block in self._blocks if path.startswith(f"{block}.")]
        return not any(self.depends.get(block, 0) & ~content for block in outer)

    def _module(self, path: str, kept: frozenset[int]) -> FrozenModule:
        entries, spec = self._outputs[path]
        first: dict[Any, int] = {}
        source: list[int | None] = []
        for i, entry in enumerate(entries):
            if entry is not None and not isinstance(entry, Tensor):
                raise ModelError(f"the output of {path} holds a {type(entry).__name__}, which is not a tensor")
            edge = _key(get_gradient_edge(entry)) if entry is not None and entry.requires_grad else i
            source.append(None if entry is None else first.setdefault(edge, i))
        fixed = frozenset(i for i, entry in enumerate(entries) if isinstance(entry, Tensor) and not entry.requires_grad)
        return FrozenModule(
            path=path,
            spec=spec,
            source=tuple(source),
            kept=kept | fixed,
            per_token=bool(self.depends[path] & _TOKENS),
        )

    def _of_entries(self, entries: Sequence[Any]) -> int:
        bits = 0
        for _, edge in _edges(entries):
            bits |= self._bits(edge.node)
        return bits

    def _bits(self, node: Node) -> int:
        """Return what a node of the graph depends on."""
        stack = [node]
        while stack:
            top = stack[-1]
            if top in self._known:
                stack.pop()
                continue
            before = [one for one, _ in top.next_functions if one is not None]
            if missing := [one for one in before if one not in self._known]:
                stack += missing
                continue
            own = self._leaves.get(id(top.variable), _TRAINED) if hasattr(top, "variable") else 0
            self._known[top] = own
            for one in before:
                self._known[top] |= self._known[one]
            stack.pop()
        return self._known[node]

    def _read(self, edges: Mapping[Any, tuple[str, int]]) -> set[tuple[str, int]]:
        """Return the stored outputs that the rest of the model reads: those from which the graph reaches its result.

        Raises:
            ModelError: the rest of the model reads pixels in another way.
        """
        read: set[tuple[str, int]] = set()
        seen: set[Node] = set()
        stack = [(edge.node, edge.output_nr) for edge in [get_gradient_edge(self.result)]]
        while stack:
            place = stack.pop()
            if place in edges:
                read.add(edges[place])
                continue
            node, _ = place
            if node in seen:
                continue
            seen.add(node)
            if hasattr(node, "variable") and self._leaves.get(id(node.variable)) == _PIXELS:
                raise ModelError("the adapted part of the model reads the pixels themselves")
            stack += [(one, number) for one, number in node.next_functions if one is not None]
        return read


def _edges(entries: Sequence[Any]) -> Iterator[tuple[int, GradientEdge]]:
    """Yield the index of each entry that is in the graph, with its edge."""
    for i, entry in enumerate(entries):
        if isinstance(entry, Tensor) and entry.requires_grad:
            yield i, get_gradient_edge(entry)


def _key(edge: GradientEdge) -> tuple[Node, int]:
    return edge.node, edge.output_nr
