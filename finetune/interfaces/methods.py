"""What a method makes of a frozen base, and the adapter that stays.

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
    """A frozen base as a method sees it."""

    model: PreTrainedModel
    towers: Towers
    tokenizer: PreTrainedTokenizerBase
    forward: Callable[[], Tensor]  # outputs for one synthetic row with an image, to find out what the forward uses


@dataclass(frozen=True, kw_only=True)
class Part:
    """The part of an adapter that one method attached.

    ``modules`` maps each tower to the full names of what is adapted in it; ``parameters`` maps the name a tensor has
    in the saved file to the live parameter.
    """

    method: str
    options: Mapping[str, Any]  # what is needed to attach it again, in PEFT's names
    modules: Mapping[str, list[str]]
    parameters: Mapping[str, nn.Parameter]
    # parameter name -> the backward pass, from 1, after which it must have had a gradient that is not zero
    alive_after: Mapping[str, int]
    learning_rates: Mapping[str, float] = field(default_factory=dict)  # parameter name -> factor, where it is not 1
    placeholders: Placeholders | None = None
    unit: str = "modules"  # what ``modules`` names: modules, or single parameters of them
    notes: tuple[str, ...] = ()  # what people should know: modules that were left out, and why


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
        """Parameter name -> the backward pass after which it must have had a gradient."""
        return {name: backward for part in self.parts for name, backward in part.alive_after.items()}

    @property
    def learning_rates(self) -> dict[str, float]:
        """Parameter name -> the factor on the learning rate, where that is not 1."""
        return {name: factor for part in self.parts for name, factor in part.learning_rates.items()}

    @property
    def placeholders(self) -> Placeholders | None:
        """The placeholders of the adapter's tuned prompt, which rows must hold; None without a prompt."""
        return next((part.placeholders for part in self.parts if part.placeholders), None)

    def freeze(self) -> None:
        """End training: a frozen adapter computes bit for bit the same as after it is loaded.

        torch chooses another way to multiply where a weight asks for a gradient, even where none is taken.
        """
        for parameter in self.parameters.values():
            parameter.requires_grad_(False)

    def describe(self) -> str:
        """Return one line per method and tower: how many modules and parameters are adapted."""
        lines = []
        for part in self.parts:
            size = sum(p.numel() for p in part.parameters.values())
            counts = ", ".join(f"{tower} {len(names)} {part.unit}" for tower, names in part.modules.items())
            lines += [f"  {part.method}: {f'{counts}, ' if counts else ''}{size:,} trainable parameters"]
            lines += [f"    {note}" for note in part.notes]
        return "\n".join(lines)


class Update(Protocol):
    """An update: the function of a finished adapter in the place of a module's ``forward``; any thread may call it."""

    @property
    def module(self) -> nn.Module:
        """The module whose ``forward`` is replaced."""
        ...

    @property
    def num_bytes(self) -> int:
        """Bytes of the tensors that the update holds beside the base."""
        ...

    def __call__(self, inner: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Return the module's output; ``inner`` is its own forward."""
        ...

    def merging(self, name: str) -> Callable[[], object]:
        """Return the function that writes the update into the module's own parameters, for good.

        Raises:
            MethodError: that cannot be; ``name`` is the module's full name.
        """
        ...


class Method(Protocol):
    """A way to adapt a frozen model; an adapter has one part for each of its methods.

    A part that trains is attached to the model, and is the only one there. A finished part stands beside any number of
    others, as updates.
    """

    def attach(self, host: Host, options: Any) -> Part:
        """Add fresh trainable parameters, as ``options`` of a recipe say; if possible, outputs do not change."""
        ...

    def check(self, model: nn.Module, towers: Towers, options: Any) -> None:
        """Raise MethodError where ``model``, which may be on the meta device, lacks a module that ``options`` adapt."""
        ...

    def detach(self, model: nn.Module) -> None:
        """Remove the part that trains and every trace of it; do nothing where there is none."""
        ...

    def is_attached(self, model: nn.Module) -> bool:
        """Return whether a part trains in ``model``."""
        ...

    def switch(self, model: nn.Module, on: bool) -> None:
        """Make the part that trains active, or the plain base; do nothing where there is none."""
        ...

    def expected_tensors(self, model: nn.Module, towers: Towers, description: Any) -> dict[str, tuple[int, ...]]:
        """Return name -> shape of the tensors that the finished part ``description`` must have on ``model``."""
        ...

    def updates(self, model: nn.Module, description: Any, tensors: Mapping[str, Tensor]) -> dict[str, Update]:
        """Return full module name -> the update of a finished part for that module."""
        ...
