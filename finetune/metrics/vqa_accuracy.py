"""The metric VQA accuracy: how many of several annotators gave the answer.

After Antol et al. 2015 (https://arxiv.org/abs/1505.00468) and
https://github.com/GT-Vision-Lab/VQA (PythonEvaluationTools/vqaEvaluation/vqaEval.py): each annotator in turn is left
out, an answer that three of the others gave is right, and the mean over annotators counts. That script normalizes
answers only where annotators differ; here all are normalized.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from finetune.metrics.normalization import normalize_vqa
from finetune.metrics.texts import answer_text

if TYPE_CHECKING:
    from collections.abc import Sequence

    from finetune.core.example import Example
    from finetune.core.prediction import Prediction

ENOUGH = 3  # annotators with the same answer


class VqaAccuracy:
    """The mean over rows of the VQA accuracy; the answers of a row are those of its annotators, with repetitions.

    Args:
        options: the section of the task; unused, since the VQA rules always hold.
    """

    key = "vqa_accuracy"
    unit = None
    higher_is_better = True
    best_value = 1.0

    def __init__(self, options: Any):
        pass

    def row(self, prediction: Prediction, example: Example) -> float | None:
        """Return the accuracy of one row, from 0 to 1; None for a row of a single annotator.

        Raises:
            DataError: the prediction is neither a text nor a label.
        """
        text = answer_text(prediction, example, metric=self.key)
        return vqa_accuracy(text, example.answers) if len(example.answers) > 1 else None


def vqa_accuracy(prediction: str, answers: Sequence[str]) -> float:
    """Return the mean over annotators of min(1, matches among the others / 3).

    Args:
        prediction: the answer of the model.
        answers: the answer of each annotator; there are at least two.
    """
    normalized = normalize_vqa(prediction)
    same = [normalize_vqa(answer) == normalized for answer in answers]
    matches = sum(same)
    return sum(min(1.0, (matches - own) / ENOUGH) for own in same) / len(same)
