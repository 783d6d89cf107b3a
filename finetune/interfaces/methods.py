"""The protocols of methods, which adapt a frozen base, and the records of their adapters.

Legend of shapes: B rows, T tokens, V vocabulary, D values of an embedding.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from torch import Tensor, nn
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from finetune.core.batch import Placeholders
    from finetune.interfaces.families import Towers


@dataclass(frozen=True)
class Host:
    """A frozen base with the objects that a method needs."""

    model: PreTrainedModel
    towers: Towers
    tokenizer: PreTrainedTokenizerBase
    forward: Callable[[], Tensor]  # returns outputs for one synthetic row with an image, to find the modules in use
    # Names of modules or parameters -> those that this forward does not use, from earlier attachments to this base.
    unused: dict[frozenset[str], list[str]] = field(default_factory=dict, repr=False)


@dataclass(frozen=True, kw_only=True)
class Part:
    """The part of an adapter that one method attached.

    ``modules`` maps each tower to the full names of its adapted modules. ``parameters`` maps the name of a tensor in
    the saved file to the live parameter.
    """

    method: str
    options: Mapping[str, Any]  # the options to attach it again, in PEFT's names
    modules: Mapping[str, list[str]]
    parameters: Mapping[str, nn.Parameter]
    # parameter name -> the backward pass, from 1, after which it must have had a gradient that is not zero
    alive_after: Mapping[str, int]
    learning_rates: Mapping[str, float] = field(default_factory=dict)  # parameter name -> factor; without an entry 1
    placeholders: Placeholders | None = None
    unit: str = "modules"  # the things that ``modules`` names: modules or parameters
    notes: tuple[str, ...] = ()  # for users, such as omitted modules with the reason


@dataclass(frozen=True)
class Attachment:
    """An adapter that trains: the parts that its methods attached."""

    parts: tuple[Part, ...]

    @property
    def parameters(self) -> dict[str, nn.Parameter]:
        """Saved name -> live parameter, of all parts."""
        return {name: parameter for part in self.parts for name, parameter in part.parameters.items()}

    @property
    def alive_after(self) -> dict[str, int]:
        """Parameter name -> the backward pass after which it must have had a gradient that is not zero."""
        return {name: backward for part in self.parts for name, backward in part.alive_after.items()}

    @property
    def learning_rates(self) -> dict[str, float]:
        """Parameter name -> the factor on the learning rate, where that is not 1."""
        return {name: factor for part in self.parts for name, factor in part.learning_rates.items()}

    @property
    def placeholders(self) -> Placeholders | None:
        """The placeholders of the adapter's tuned prompt, which batches must contain; None without a prompt."""
        return next((part.placeholders for part in self.parts if part.placeholders), None)

    def freeze(self) -> None:
        """End training, so that the adapter computes bit for bit the same as after it is loaded.

        torch uses another kernel where a weight requires a gradient, even if none is computed.
        """
        for parameter in self.parameters.values():
            parameter.requires_grad_(False)

    def describe(self) -> str:
        """Return one line per method, with the number of adapted modules in each tower and of parameters."""
        lines = []
        for part in self.parts:
            size = sum(p.numel() for p in part.parameters.values())
            counts = ", ".join(f"{tower} {len(names)} {part.unit}" for tower, names in part.modules.items())
            lines += [f"  {part.method}: {f'{counts}, ' if counts else ''}{size:,} trainable parameters"]
            lines += [f"    {note}" for note in part.notes]
        return "\n".join(lines)


class Update(Protocol):
    """An update: a finished adapter's function that replaces a module's ``forward``; any thread may call it."""

    @property
    def module(self) -> nn.Module:
        """The module whose ``forward`` it replaces."""
        ...

    @property
    def num_bytes(self) -> int:
        """The number of bytes of the update's own tensors."""
        ...

    def __call__(self, inner: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Return the module's output; ``inner`` is its own forward."""
        ...

    def merging(self, name: str) -> Callable[[], object]:
        """Return the function that merges the update into the module's own parameters, which cannot be undone.

        Args:
            name: the full name of the module, for errors.

        Raises:
            MethodError: the update cannot be merged.
        """
        ...


class Method(Protocol):
    """A method: a way to adapt a frozen model. An adapter has one part for each of its methods.

    A model has at most one attached part of a method, which trains. Finished parts are updates, any number at a time.
    """

    def attach(self, host: Host, options: Any) -> Part:
        """Add fresh trainable parameters by the ``options`` of a recipe, if possible without a change of outputs."""
        ...

    def check(self, model: nn.Module, towers: Towers, options: Any) -> None:
        """Raise MethodError if ``model``, which may be on the meta device, lacks a module that ``options`` adapt."""
        ...

    def detach(self, model: nn.Module) -> None:
        """Remove the part that trains, completely; do nothing if there is none."""
        ...

    def is_attached(self, model: nn.Module) -> bool:
        """Return whether a part trains in ``model``."""
        ...

    def switch(self, model: nn.Module, on: bool) -> None:
        """Turn the part that trains on or off; do nothing if there is none."""
        ...

    def expected_tensors(self, model: nn.Module, towers: Towers, description: Any) -> dict[str, tuple[int, ...]]:
        """Return name -> shape of the tensors that the finished part ``description`` must have on ``model``."""
        ...

    def updates(self, model: nn.Module, description: Any, tensors: Mapping[str, Tensor]) -> dict[str, Update]:
        """Return full module name -> the update of a finished part for that module."""
        ...
