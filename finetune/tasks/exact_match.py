"""What tasks share whose predictions are answers: right is what equals a reference after normalisation."""

from __future__ import annotations

from typing import TYPE_CHECKING

from finetune.tasks.metrics import normalize_vqa

if TYPE_CHECKING:
    from finetune.example import Example


class ExactMatch:
    """Judges an answer by its VQA normalisation."""

    def is_correct(self, prediction: str, example: Example) -> bool:
        """Tells whether the prediction equals any reference after VQA normalisation."""
        said = normalize_vqa(prediction)
        return any(said == normalize_vqa(reference) for reference in example.answers)

    def reference(self, example: Example) -> str:
        """Returns the answer that majorities are counted over."""
        return normalize_vqa(example.answers[0])
