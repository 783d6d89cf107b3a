"""The protocols of objectives, which a run minimises over the outputs of a task.

Legend of shapes: B rows, T tokens, V vocabulary, D values of an embedding.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol, TypeAlias

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from torch import Tensor, nn

    from finetune.core.batch import Batch


@dataclass(frozen=True)
class LossSum:
    """A loss as a sum over ``num_items`` items, so that micro-batches and processes add up exactly."""

    loss_sum: Tensor  # scalar, with gradient
    num_items: int
    weight: float = 1.0  # of its mean in the minimised loss


# A task's ``outputs``.
Outputs: TypeAlias = "Callable[[nn.Module, Batch], Tensor]"


class StepContext(Protocol):
    """One micro-batch for an objective, the same for every strategy that shares work over processes."""

    @property
    def model(self) -> nn.Module:
        """The adapted model of the loop; an objective reads frozen values from it, such as a temperature."""
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

        An objective that calls it sets ``needs_reference``.
        """
        ...


class Objective(Protocol):
    """An objective that a run minimises over the outputs of a task.

    Its section sets ``couples_rows`` if the loss of a row depends on the other rows of an optimizer step. Such an
    objective is a ``CoupledObjective``.
    """

    needs_reference: bool  # True if ``terms`` uses the outputs of the base alone

    def count_items(self, batch: Batch) -> dict[str, int]:
        """Return each term -> the number of items that it sums over, before any forward."""
        ...

    def terms(self, step: StepContext) -> dict[str, LossSum]:
        """Return the loss terms of one micro-batch alone."""
        ...


class CoupledObjective(Objective, Protocol):
    """An objective that compares the rows of a whole optimizer step, over all processes, with each other."""

    def accumulate_gradients(
        self,
        model: nn.Module,
        outputs: Outputs,
        batches: Sequence[Batch],
        backward: Callable[[Callable[[], Tensor]], None],
    ) -> list[dict[str, Tensor]]:
        """Run the micro-batches of an optimizer step forward and backward.

        Args:
            model: the model of the loop; it may be wrapped for several processes.
            outputs: the task's ``outputs``.
            batches: this process's micro-batches, on the model's device; every process has the same number.
            backward: the function that runs a given function, and the backward pass of its scalar result; call it once
                for each micro-batch, in order. It adds up gradients over micro-batches and processes.

        Returns:
            For each micro-batch the sum of each term, detached.
        """
        ...

    def choice_loss(self, model: nn.Module, batch: Batch) -> LossSum:
        """Return the loss of rows to answer, each compared with its own choices and with no other row."""
        ...
