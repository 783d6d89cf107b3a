"""The protocols and small records by which families, methods, data, tasks and training meet.

Legend of shapes: B rows, T tokens, V vocabulary, D values of an embedding.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, Protocol, TypeAlias, runtime_checkable

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from PIL.Image import Image
    from torch import Tensor, nn
    from transformers import PreTrainedModel, PreTrainedTokenizerBase, ProcessorMixin

    from finetune.core.batch import Batch, ImageFeatures, Placeholders, Rendered
    from finetune.core.example import Example, Message
    from finetune.core.prediction import Prediction
    from finetune.recipe import AttnImplementation, Quantization, ReadSection, TaskSection

PaddingSide = Literal["left", "right"]
# Tower -> full paths of the modules that make it up. Most models have "language", "projector" and "vision"; a model may
# have others, such as "fusion", and lacks the key of a tower that it does not have.
Towers = Mapping[str, tuple[str, ...]]


@dataclass(frozen=True)
class LossSum:
    """A loss that is a sum over ``num_items`` items, so that micro-batches and processes add up exactly."""

    loss_sum: Tensor  # scalar, with gradient
    num_items: int
    weight: float = 1.0  # of its mean in what is minimised


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


class ModelFamily(Protocol):
    """A model family: loading, towers, inputs and outputs, which depend on the base's ``model_type``."""

    model_type: str
    architecture: str  # what its models do: generative, dual_encoder, or another word
    media: frozenset[str]  # the types of media that its models take, such as image
    auto_class: Any  # transformers' own that loads its models

    def load(
        self,
        name_or_path: str,
        *,
        revision: str | None,
        dtype: str,
        device: str,
        quantization: Quantization | None,
        attn_implementation: AttnImplementation,
    ) -> tuple[PreTrainedModel, ProcessorMixin]:
        """Return the frozen model in eval mode, and its processor."""
        ...

    def skeleton(self, name_or_path: str, *, revision: str | None = None) -> PreTrainedModel:
        """Return the model on the meta device: names and shapes, and no weights."""
        ...

    def towers(self, model: nn.Module) -> Towers:
        """Return the modules that make up each tower of ``model``."""
        ...

    def encode(
        self, processor: ProcessorMixin, rows: Sequence[Rendered], *, padding_side: PaddingSide
    ) -> dict[str, Any]:
        """Return the model's inputs of rendered rows, whose media are of types that it takes."""
        ...

    def outputs(self, model: nn.Module, inputs: Mapping[str, Tensor]) -> Tensor:
        """Return the outputs that answers are read from, [B, rows, values]: logits of tokens, or embeddings."""
        ...


class GenerativeFamily(ModelFamily, Protocol):
    """A family that generates text."""

    def mark_supervised(self, inputs: dict[str, Tensor], labels: Tensor) -> dict[str, Tensor]:
        """Return the inputs of a training batch, with marks of the supervised tokens where the model needs them."""
        ...

    def image_features(self, model: PreTrainedModel, processor: ProcessorMixin, images: list[Image]) -> ImageFeatures:
        """Run the frozen vision tower and projector on the images of one row.

        Raises:
            ModelError: this model does not take features in the place of images.
        """
        ...


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


class RowTokens(NamedTuple):
    """The length of a row, in tokens."""

    row: int  # all of it that the model is given, the tokens of its images included
    answer: int  # its longest answer, with the token that ends it


class RowLengths(Protocol):
    """A counter of the tokens of rows that opens no image and raises RowError for rows that no batch can hold."""

    @property
    def collator(self) -> TaskCollator:
        """The collator that makes batches of the rows."""
        ...

    def of_training_row(self, example: Example, sizes: Sequence[tuple[int, int]]) -> RowTokens:
        """Return the tokens of a training row whose images have these widths and heights.

        Raises:
            RowError: it cannot be a training row of this base.
        """
        ...

    def of_prompt(self, example: Example, sizes: Sequence[tuple[int, int]]) -> RowTokens:
        """Return the tokens of a row that is to be answered."""
        ...


class TaskCollator(Protocol):
    """A collator: makes the batches of a task for one base, on the CPU; worker processes have copies of it.

    Attributes:
        processor: the base's processor.
        max_image_pixels: the largest width x height of an image, in pixels.
    """

    processor: ProcessorMixin
    max_image_pixels: int

    @property
    def max_aspect(self) -> int:
        """Largest ratio of an image's longer side to its shorter side."""
        ...

    def render(self, messages: list[Message]) -> str:
        """Return a conversation as the text of a row in a batch."""
        ...

    def training_batch(self, rows: Sequence[tuple[Example, bool]]) -> Batch:
        """Return rows with labels; a row paired with False fills up a batch and is not supervised."""
        ...

    def prompt_batch(self, examples: Sequence[Example]) -> Batch:
        """Return rows that are to be answered."""
        ...

    def show(self, example: Example) -> str:
        """Return a training row as text for people, with its supervised parts between ⟦ and ⟧."""
        ...

    def copy(self) -> TaskCollator:
        """Return a collator with a processor of its own: a processor serves one thread at a time."""
        ...

    def lengths(self, *, key: str) -> RowLengths:
        """Return the counter of the rows' tokens; ``key`` changes when the processor does."""
        ...


class Metric(Protocol):
    """A metric of predictions: a ``RowMetric``, a ``CorpusMetric``, or both.

    It is built with the options of its task.

    Attributes:
        key: the name of the metric in the table of metrics.
        unit: the unit of the values; None for a share, or a number without a unit.
        higher_is_better: whether a larger value is better.
    """

    key: str
    unit: str | None
    higher_is_better: bool


@runtime_checkable
class RowMetric(Metric, Protocol):
    """A metric that gives each row a value; its value for many rows is their mean."""

    def row(self, prediction: Prediction, example: Example) -> float | None:
        """Return the value of one row, or None to leave the row out of the mean."""
        ...


@runtime_checkable
class CorpusMetric(Metric, Protocol):
    """A metric whose value for many rows is not a mean over them."""

    def corpus(self, predictions: Sequence[Prediction], examples: Sequence[Example]) -> float:
        """Return the value of all these rows together, of which there is at least one."""
        ...


class Task(Protocol):
    """A task: the prediction for a row, and the metrics that evaluate it."""

    options: TaskSection
    metrics: tuple[str, ...]  # by name, where the options name none; the first chooses the best checkpoint

    @staticmethod
    def collator(
        family: ModelFamily, model: PreTrainedModel, processor: ProcessorMixin, data: ReadSection | None
    ) -> TaskCollator:
        """Return the collator of this kind of task for a base; the task's options do not change it.

        Args:
            family: the family of the base.
            model: the base model.
            processor: the base's processor.
            data: the recipe's settings for rows and images; None for the defaults.

        Raises:
            ModelError: the base lacks something that it takes.
        """
        ...

    def outputs(self, model: nn.Module, batch: Batch) -> Tensor:
        """Return the outputs that objectives take, of a batch with labels; ``model`` may be wrapped for processes.

        Of which kind it is, the task's section says: ``token_logits``, the logits [N, V] that predict the supervised
        tokens; ``pair_embeddings``, the fp32 embeddings [B, 2, D] of images and texts; or another word, which names
        what the task's own objectives take.
        """
        ...

    def predict(self, model: nn.Module, batch: Batch) -> list[Prediction]:
        """Return one prediction per row."""
        ...

    def constant(self, examples: Sequence[Example]) -> Prediction:
        """Return the best single prediction for all of these rows, of which there is at least one.

        Of one row it is that row's reference.
        """
        ...


# A task's ``outputs``.
Outputs: TypeAlias = "Callable[[nn.Module, Batch], Tensor]"


class StepContext(Protocol):
    """One micro-batch as an objective sees it, the same for every strategy that shares work over processes."""

    @property
    def model(self) -> nn.Module:
        """The adapted model as the loop runs it; an objective reads frozen values from it, such as a temperature."""
        ...

    @property
    def batch(self) -> Batch:
        """The rows, on the model's device."""
        ...

    def forward(self) -> Tensor:
        """Return the task's outputs by the adapted model, with gradient; they are computed only once."""
        ...

    def reference(self) -> Tensor:
        """Return the same outputs by the base alone, without gradient; the shape is that of ``forward``.

        An objective that calls it says so by ``needs_reference``.
        """
        ...


class Objective(Protocol):
    """An objective that a run minimises over the outputs of a task.

    Its section says by ``couples_rows`` whether the loss of a row depends on the other rows of an optimizer step. If it
    does, the objective is a ``CoupledObjective``.
    """

    needs_reference: bool  # whether ``terms`` asks for the outputs of the base alone

    def count_items(self, batch: Batch) -> dict[str, int]:
        """Return the number of items that each term is a sum over, before any forward."""
        ...

    def terms(self, step: StepContext) -> dict[str, LossSum]:
        """Return the loss terms of one micro-batch, by itself."""
        ...


class CoupledObjective(Objective, Protocol):
    """An objective that compares the rows of a whole optimizer step, over all processes, with each other."""

    def backward_window(
        self,
        model: nn.Module,
        outputs: Outputs,
        batches: Sequence[Batch],
        backward: Callable[[Callable[[], Tensor]], None],
    ) -> list[dict[str, Tensor]]:
        """Run the micro-batches of an optimizer step forward and backward.

        Args:
            model: the model as the loop runs it; it may be wrapped for several processes.
            outputs: the task's ``outputs``.
            batches: this process's micro-batches, on the model's device; every process has the same number.
            backward: the function that runs a given function, and the backward pass of its scalar result; call it once
                for each micro-batch, in order. Gradients are added up over micro-batches and processes.

        Returns:
            For each micro-batch the sum of each term, detached.
        """
        ...

    def choice_loss(self, model: nn.Module, batch: Batch) -> LossSum:
        """Return the loss of rows that are to be answered, each held against its own choices and no other row."""
        ...
