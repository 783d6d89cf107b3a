"""The protocols and small records by which families, methods, data, tasks and training meet.

Legend of shapes: B rows, T tokens, V vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal, Protocol

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    import torch
    from PIL.Image import Image
    from torch import Tensor, nn
    from transformers import PreTrainedModel, ProcessorMixin

    from finetune.example import Example
    from finetune.recipe import TaskSection

TOWERS = ("language", "projector", "vision")
PaddingSide = Literal["left", "right"]


@dataclass(frozen=True)
class Towers:
    """Full paths of the modules that make up each tower; an empty tuple where a model has none."""

    language: tuple[str, ...]
    projector: tuple[str, ...]
    vision: tuple[str, ...]

    def items(self) -> Iterator[tuple[str, tuple[str, ...]]]:
        """Yields (tower, paths) in a fixed order."""
        for tower in TOWERS:
            yield tower, getattr(self, tower)


@dataclass(frozen=True)
class Batch:
    """Rows ready for the model.

    ``inputs`` are the model's keyword arguments; ``labels`` is [B, T] with -100 where nothing is learnt, or None
    for rows that are only to be answered.
    """

    inputs: dict[str, Tensor]
    examples: list[Example]
    labels: Tensor | None = None

    def to(self, device: Any, dtype: torch.dtype) -> Batch:
        """Returns the batch with its tensors on ``device``, pictures in the model's ``dtype``."""
        inputs = {
            name: tensor.to(device, dtype) if tensor.is_floating_point() else tensor.to(device)
            for name, tensor in self.inputs.items()
        }
        return Batch(inputs, self.examples, None if self.labels is None else self.labels.to(device))


@dataclass(frozen=True)
class LossSum:
    """A loss that is a sum over ``num_items`` things, so that micro-batches and processes add up exactly."""

    loss_sum: Tensor  # scalar, with gradient
    num_items: int


@dataclass(frozen=True)
class Attachment:
    """What a method attached to a model.

    ``modules`` maps each tower to the full names of its adapted modules; ``parameters`` maps the name a tensor
    has in the saved file to the live parameter.
    """

    adapter_name: str
    modules: Mapping[str, list[str]]
    parameters: Mapping[str, nn.Parameter]
    options: Mapping[str, Any]  # the method's own, in PEFT's names
    config: Mapping[str, Any]  # what adapter_config.json holds
    # parameter name -> the backward pass, from 1, after which it must have had a gradient that is not zero
    alive_after: Mapping[str, int] = field(default_factory=dict)

    def describe(self) -> str:
        """Returns one line per tower: how many modules and parameters are adapted."""
        total = sum(p.numel() for p in self.parameters.values())
        lines = [f"  {tower:<10}{len(names):>5} modules" for tower, names in self.modules.items()]
        return "\n".join([*lines, f"  {'in all':<10}{total:>12,} trainable parameters"])


class ModelFamily(Protocol):
    """What differs between vision-language models of different ``model_type``."""

    model_type: str

    def load(
        self, name_or_path: str, *, revision: str | None, dtype: str, device: str
    ) -> tuple[PreTrainedModel, ProcessorMixin]:
        """Returns the frozen model in eval mode, and its processor."""
        ...

    def towers(self, model: nn.Module) -> Towers:
        """Returns where the towers of ``model`` are."""
        ...

    def encode(
        self,
        processor: ProcessorMixin,
        texts: Sequence[str],
        images: Sequence[list[Image]],
        *,
        padding_side: PaddingSide,
    ) -> dict[str, Tensor]:
        """Returns the model's inputs for rendered ``texts`` and each one's pictures."""
        ...


class Method(Protocol):
    """A way to adapt a frozen model."""

    def attach(self, model: nn.Module, towers: Towers) -> Attachment:
        """Adds fresh trainable parameters to ``model``; refuses a model that is already adapted."""
        ...

    def attach_saved(
        self, model: nn.Module, adapter_name: str, description: Any, tensors: Mapping[str, Tensor]
    ) -> Attachment:
        """Adds a finished adapter, not trainable, under ``adapter_name``; leaves nothing behind if it fails."""
        ...

    def detach(self, model: nn.Module, adapter_name: str) -> None:
        """Removes an adapter and every trace of it."""
        ...

    def expected_tensors(self, model: nn.Module, description: Any) -> dict[str, tuple[int, ...]]:
        """Returns name -> shape of the tensors that ``description`` must have on ``model``."""
        ...


class Task(Protocol):
    """What is optimised and how it is judged."""

    options: TaskSection

    def count_items(self, batch: Batch) -> dict[str, int]:
        """Returns how many things each term is a sum over, known before any forward."""
        ...

    def terms(self, model: nn.Module, batch: Batch) -> dict[str, LossSum]:
        """Returns the loss terms of one micro-batch."""
        ...

    def predict(self, model: nn.Module, batch: Batch) -> list[str]:
        """Returns one answer per row."""
        ...

    def is_correct(self, prediction: str, example: Example) -> bool:
        """Tells whether ``prediction`` counts as right."""
        ...

    def reference(self, example: Example) -> str:
        """Returns the normalised answer that majorities are counted over."""
        ...
