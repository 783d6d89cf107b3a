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
