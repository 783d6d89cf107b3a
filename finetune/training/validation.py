"""The result of one validation, and the comparison of two results."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Mapping


@dataclass(frozen=True, kw_only=True)
class Validation:
    """The result of one validation.

    Attributes:
        values: each name of a metric -> its value; the first is the score that chooses the best weights.
        loss: the loss of the references, in nats per supervised token, or per row if the task couples rows; None if
            it is not finite.
        higher_is_better: whether a larger score is better.
    """

    values: Mapping[str, float]
    loss: float | None
    higher_is_better: bool = True

    @property
    def metric(self) -> str:
        """The name of the metric that chooses."""
        return next(iter(self.values))

    @property
    def score(self) -> float:
        """The value of the metric that chooses."""
        return self.values[self.metric]

    def is_better(self, than_score: float | None, than_loss: float | None) -> bool:
        """Return whether this is better than the best so far: by its score, or by its loss if scores are equal."""
        if than_score is None:
            return True
        if self.score != than_score:
            return (self.score > than_score) == self.higher_is_better
        return self.loss is not None and (than_loss is None or self.loss < than_loss)

    def is_as_good(self, as_score: float | None, as_loss: float | None) -> bool:
        """Return whether score and loss are equal to these, so that the later step is chosen."""
        return (self.score, self.loss) == (as_score, as_loss)

    @property
    def numbers(self) -> dict[str, float]:
        """The numbers for the log."""
        losses = {} if self.loss is None else {"loss": self.loss}
        return {name: round(value, 6) for name, value in self.values.items()} | losses

    def describe(self) -> str:
        """Return the values as text."""
        scores = ", ".join(f"{name.replace('_', ' ')} {value:.3f}" for name, value in self.values.items())
        return f"{scores}, loss {'not finite' if self.loss is None else f'{self.loss:.4f}'}"


@dataclass(frozen=True, kw_only=True)
class DecidedValidation:
    """A validation that ended early, because it could no longer be the best. Its score and loss are unknown.

    Attributes:
        metric: the name of the metric that chooses.
        num_rows: the number of rows that were predicted.
        of: the number of all validation rows.
        best: the best score so far, which it cannot reach.
    """

    metric: str
    num_rows: int
    of: int
    best: float
    score: None = None
    loss: None = None

    def is_better(self, than_score: float | None, than_loss: float | None) -> bool:
        """Return False: it is worse than the best so far."""
        return False

    def is_as_good(self, as_score: float | None, as_loss: float | None) -> bool:
        """Return False: it is worse than the best so far."""
        return False

    @property
    def numbers(self) -> dict[str, float]:
        """The numbers for the log."""
        return {"rows": self.num_rows}

    def describe(self) -> str:
        """Return why it ended, as text."""
        name = self.metric.replace("_", " ")
        return f"ended after {self.num_rows} of {self.of} rows: {name} can no longer reach {self.best:.3f}"


AnyValidation = Validation | DecidedValidation
