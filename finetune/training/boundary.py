"""The boundary of what trains: the frozen modules below the adapter, whose outputs for a row never change."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from torch.utils._pytree import TreeSpec, tree_flatten, tree_unflatten

from finetune.errors import ModelError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class FrozenModule:
    """A frozen module whose output for a row is stored.

    Attributes:
        path: the full name of the module.
        spec: the structure of its output.
        source: for each entry of the output, the index of the entry that holds the same tensor, which may be its own;
            None for an entry that is always None.
        kept: the indices of the entries that the rest of the model reads.
        per_token: whether the output has an entry for each token.
    """

    path: str
    spec: TreeSpec
    source: tuple[int | None, ...]
    kept: frozenset[int]
    per_token: bool

    def tensors(self, output: Any) -> list[Tensor]:
        """Return the different tensors of an output of the module."""
        entries, spec = tree_flatten(output)
        if spec != self.spec:
            raise ModelError(f"the output of {self.path} has another structure for other rows")
        return [entries[i] for i in self.indices]

    def output(self, tensors: Sequence[Tensor]) -> Any:
        """Return an output of the module that has these ``tensors``."""
        found = dict(zip(self.indices, tensors, strict=True))
        return tree_unflatten([None if i is None else found[i] for i in self.source], self.spec)

    @property
    def indices(self) -> list[int]:
        """The index of each different tensor."""
        return [i for i, source in enumerate(self.source) if source == i]


@dataclass(frozen=True, kw_only=True)
class Boundary:
    """Frozen modules, in the order of their calls; the rest of the model reads nothing else of what is before them."""

    modules: tuple[FrozenModule, ...]

    @property
    def key(self) -> list[Any]:
        """Return a value for JSON that says which outputs are stored."""
        return [[module.path, sorted(module.kept)] for module in self.modules]

    @property
    def end(self) -> str:
        """The full names of the modules whose outputs are stored, for people."""
        return ", ".join(module.path for module in self.modules if module.kept)

    @property
    def per_token(self) -> frozenset[str]:
        """The modules whose outputs have an entry for each token."""
        return frozenset(module.path for module in self.modules if module.per_token)


@dataclass(frozen=True, kw_only=True)
class Boundaries:
    """The two boundaries of an adapted model.

    Attributes:
        images: the modules that read pixels and no tokens, so that their outputs serve every row with the same images.
        rows: these and the frozen layers of the language tower, whose outputs depend on all of a row's tokens; None if
            the first layer trains already.
    """

    images: Boundary
    rows: Boundary | None
