"""What tasks share whose predictions are answers: right is what equals a reference after normalization."""

from __future__ import annotations

from typing import TYPE_CHECKING

from finetune.metrics.exact_match import exact_match

if TYPE_CHECKING:
    from finetune.example import Example
    from finetune.recipe import AnswerSection


class ExactMatch:
    """Compares answers in the normalization that the task's section names."""

    options: AnswerSection

    def is_correct(self, prediction: str, example: Example) -> bool:
        """Return whether the prediction equals any reference."""
        return exact_match(prediction, example.answers, normalize=self.options.normalize)

    def reference(self, example: Example) -> str:
        """Return the normalized answer that majorities are counted over."""
        return self.options.normalize(example.answers[0])
