"""The protocols of tasks: the lengths of rows, their batches, predictions and metrics.

Legend of shapes: B rows, T tokens, V vocabulary, D values of an embedding.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple, Protocol, runtime_checkable

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from torch import Tensor, nn
    from transformers import PreTrainedModel, ProcessorMixin

    from finetune.core.batch import Batch
    from finetune.core.example import Example, Message
    from finetune.core.prediction import Prediction
    from finetune.interfaces.families import ModelFamily
    from finetune.recipe import ReadSection, TaskSection


class RowTokens(NamedTuple):
    """The length of a row, in tokens."""

    row: int  # of the whole input, with the tokens of its images
    answer: int  # of its longest answer, with the end token


class RowLengths(Protocol):
    """A counter of the tokens of rows that opens no image, and raises RowError for rows that fit no batch."""

    @property
    def collator(self) -> TaskCollator:
        """The collator that makes batches of the rows."""
        ...

    def of_training_row(self, example: Example, sizes: Sequence[tuple[int, int]]) -> RowTokens:
        """Return the tokens of a training row whose images have these widths and heights.

        Raises:
            RowError: the row cannot be a training row of this base.
        """
        ...

    def of_prompt(self, example: Example, sizes: Sequence[tuple[int, int]]) -> RowTokens:
        """Return the tokens of a row to answer."""
        ...


class TaskCollator(Protocol):
    """A collator, which makes the batches of a task for one base, on the CPU; worker processes have copies of it.

    Attributes:
        processor: the base's processor.
        max_image_pixels: the largest width x height of an image, in pixels.
    """

    processor: ProcessorMixin
    max_image_pixels: int

    @property
    def max_aspect(self) -> int:
        """The largest ratio of an image's longer side to its shorter side."""
        ...

    def render(self, messages: list[Message]) -> str:
        """Return a conversation as the text of a row in a batch."""
        ...

    def training_batch(self, rows: Sequence[tuple[Example, bool]]) -> Batch:
        """Return a batch of rows with labels; a row paired with False only completes a batch, without supervision."""
        ...

    def prompt_batch(self, examples: Sequence[Example]) -> Batch:
        """Return a batch of rows to answer."""
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
        higher_is_better: True if a larger value is better.
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


class BoundedMetric(RowMetric, Protocol):
    """A row metric that states the best value that a row can have, which ``train.end_decided_validations`` needs."""

    best_value: float


@runtime_checkable
class CorpusMetric(Metric, Protocol):
    """A metric whose value for many rows is not a mean over them."""

    def corpus(self, predictions: Sequence[Prediction], examples: Sequence[Example]) -> float | None:
        """Return the value of all these rows together, or None if they have none; there is at least one row."""
        ...


class Task(Protocol):
    """A task: the prediction for a row, and the metrics that evaluate it."""

    options: TaskSection
    metrics: tuple[str, ...]  # names, if the options give none; the first metric chooses the best checkpoint

    @staticmethod
    def collator(
        family: ModelFamily, model: PreTrainedModel, processor: ProcessorMixin, data: ReadSection | None
    ) -> TaskCollator:
        """Return the collator of this task for a base; the task's options do not change it.

        Args:
            family: the family of the base.
            model: the base model.
            processor: the base's processor.
            data: the recipe's settings for rows and images; None for the defaults.

        Raises:
            ModelError: the base lacks something that the collator needs.
        """
        ...

    def outputs(self, model: nn.Module, batch: Batch) -> Tensor:
        """Return the outputs for objectives, of a batch with labels; ``model`` may be wrapped for several processes.

        The task's section names the kind of outputs: ``token_logits``, the logits [N, V] that predict the supervised
        tokens; ``pair_embeddings``, the fp32 embeddings [B, 2, D] of images and texts; or another word, for the task's
        own objectives.
        """
        ...

    def predict(self, model: nn.Module, batch: Batch) -> list[Prediction]:
        """Return one prediction per row."""
        ...

    def constant(self, examples: Sequence[Example]) -> Prediction:
        """Return the best single prediction for all of these rows; for one row, its reference.

        There is at least one row.
        """
        ...


class Prompts(Protocol):
    """The inputs of rows without their answers."""

    @property
    def prompt_batch(self) -> Callable[[Sequence[Example]], Batch]:
        """The function that returns a batch of rows to answer."""
        ...

    @property
    def prompt_parts(self) -> Callable[[Example], tuple[list[int], list[int]] | None] | None:
        """The function that returns the ids of a prompt up to its last image, one for each image, and those after it.

        It returns None for a row whose ids are unknown before it is in a batch. None in its place if all are.
        """
        ...


@runtime_checkable
class PreparedTask(Task, Protocol):
    """A task that needs the collator of its base before it predicts, such as for the tokens of its labels."""

    def prepare(self, collator: TaskCollator) -> None:
        """Take from the collator what predictions need; no other thread uses the collator meanwhile.

        Raises:
            DataError: the settings of the task do not fit the base.
        """
        ...


@runtime_checkable
class RowsTask(Task, Protocol):
    """A task that can predict rows in an order of its own, rather than batch by batch."""

    def why_fixed_batches(self, model: PreTrainedModel) -> str | None:
        """Return why ``predict_rows`` cannot be used, for the user; None if nothing is known."""
        ...

    def predict_rows(
        self,
        model: PreTrainedModel,
        prompts: Prompts,
        examples: Sequence[Example],
        *,
        order: Sequence[int],
        share: tuple[int, int],
        batch_size: int,
        on_prediction: Callable[[int, Prediction], object],
    ) -> str | None:
        """Predict rows, each as soon as there is room for it; arguments and result as in ``GenerativeTask``."""
        ...
