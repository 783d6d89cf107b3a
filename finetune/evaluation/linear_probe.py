"""The linear probe, a baseline: a linear classifier of image features that the frozen base alone computes.

Each question, which is a whole prompt, has a classifier of its own. It is fitted to the train rows with that prompt if
their answers are a closed set: from 2 to ``MOST_CLASSES`` different first references after normalization, with at least
``LEAST_ROWS`` rows each on average. Rows of other questions, and rows without an image, get no prediction.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch

from finetune.core.example import draw
from finetune.core.outside_text import safe_line
from finetune.core.prediction import Label
from finetune.evaluation.cells import words
from finetune.evaluation.logistic_regression import choose_penalty, fit
from finetune.evaluation.measured import Measured

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    import numpy as np
    from torch import Tensor

    from finetune.core.example import Example
    from finetune.core.prediction import Prediction
    from finetune.evaluation.evaluate import Evaluation
    from finetune.interfaces import Metric, Task

    Vectors = Callable[[Sequence[Example]], np.ndarray]  # rows -> one vector of image features a row, [N, D]

MOST_CLASSES = 200  # of a closed set of answers
LEAST_ROWS = 5  # train rows of a question for each of its answers, on average
MOST_ROWS = 10_000  # train rows of a question that its classifier is fitted to
_LEAST_HELD = 20  # val rows of a question that are enough to choose its penalty
_HELD = 5  # else one of this many images of the train rows is held out to choose it
_ROUNDING = 1e-9
_MARGIN = 0.02  # an adapter that is worse than the probe by more is warned about


@dataclass(frozen=True, kw_only=True)
class ClosedQuestion:
    """A question whose answers are a closed set.

    Attributes:
        rows: the train rows that its classifier is fitted to.
        classes: each answer after normalization -> the number of its class.
        predictions: the prediction that stands for each class.
    """

    rows: list[Example]
    classes: dict[str, int]
    predictions: list[Prediction]

    def prediction(self, probabilities: Sequence[float], example: Example) -> Prediction:
        """Return the most probable prediction for a row; that of a label has the probabilities as scores."""
        found = self.predictions[max(range(len(probabilities)), key=probabilities.__getitem__)]
        if not isinstance(found, Label):
            return found
        names = [str(one) for one in self.predictions]
        scores = dict.fromkeys(example.choices, 0.0) | dict(zip(names, probabilities, strict=True))
        return replace(found, scores=scores)


class LinearProbe:
    """A linear probe for the rows of a run.

    Args:
        task: the task, which normalizes answers and makes predictions of them.
        train: the train rows.
    """

    def __init__(self, task: Task, train: Sequence[Example]):
        self._normalize: Callable[[str], str] = getattr(task.options, "normalize", str.strip)
        usable = [row for row in train if row.answers and len(row.captions) < 2]
        rows_of = {question: [usable[i] for i in places] for question, places in _by_question(usable).items()}
        found = {question: self._closed(task, rows) for question, rows in rows_of.items()}
        self.questions = {question: closed for question, closed in found.items() if closed is not None}

    @property
    def fitted_rows(self) -> list[Example]:
        """The train rows that the classifiers are fitted to."""
        return [row for closed in self.questions.values() for row in closed.rows]

    def covered(self, rows: Sequence[Example]) -> list[Example]:
        """Return the rows that the probe has a prediction for."""
        return [
            rows[i] for question, places in _by_question(rows).items() if question in self.questions for i in places
        ]

    def predict(self, rows: Sequence[Example], *, val: Sequence[Example], vectors: Vectors) -> list[Prediction | None]:
        """Return one prediction a row; None for a row that is not covered.

        Args:
            rows: the rows to predict.
            val: the val rows, which choose the strength of each penalty where they are enough.
            vectors: the function that returns the image features of rows.
        """
        found: list[Prediction | None] = [None] * len(rows)
        val_rows = _by_question(val)
        for question, places in _by_question(rows).items():
            if (closed := self.questions.get(question)) is None:
                continue
            own, asked = [val[i] for i in val_rows.get(question, [])], [rows[i] for i in places]
            probabilities = self._probabilities(closed, own, asked, vectors)
            for i, of_row in zip(places, probabilities.tolist(), strict=True):
                found[i] = closed.prediction(of_row, rows[i])
        return found

    def _closed(self, task: Task, rows: list[Example]) -> ClosedQuestion | None:
        """Return the question that these rows ask; None if its answers are no closed set."""
        rows_of: dict[str, list[Example]] = {}
        for row in rows:
            rows_of.setdefault(self._normalize(row.answers[0]), []).append(row)
        if not 2 <= len(rows_of) <= MOST_CLASSES or len(rows) < LEAST_ROWS * len(rows_of):
            return None
        step = max(1, len(rows) / MOST_ROWS)  # evenly, since the rows of a class may stand together
        return ClosedQuestion(
            rows=[rows[int(i * step)] for i in range(min(len(rows), MOST_ROWS))],
            classes={answer: i for i, answer in enumerate(rows_of)},
            predictions=[task.constant(of_class) for of_class in rows_of.values()],
        )

    def _probabilities(
        self, closed: ClosedQuestion, val: Sequence[Example], rows: Sequence[Example], vectors: Vectors
    ) -> Tensor:
        """Return the probability of each class, [N, K], for ``rows``."""
        num_classes = len(closed.classes)
        features, labels = self._data(closed, closed.rows, vectors)
        known = [row for row in val if self._normalize(row.answers[0]) in closed.classes]
        if len(known) >= _LEAST_HELD:
            penalty = choose_penalty(features, labels, *self._data(closed, known, vectors), num_classes=num_classes)
        else:
            # By images, because two rows about one image would show the answer.
            held = torch.tensor(
                [draw(_HELD, "linear probe", str(row.meta.get("image", row.id))) == 0 for row in closed.rows]
            )
            if bool(held.all()):
                held = ~held
            parts = features[~held], labels[~held], features[held], labels[held]
            penalty = choose_penalty(*parts, num_classes=num_classes)
        regression = fit(features, labels, num_classes=num_classes, penalty=penalty)
        return regression.probabilities(torch.from_numpy(vectors(rows)).double())

    def _data(self, closed: ClosedQuestion, rows: Sequence[Example], vectors: Vectors) -> tuple[Tensor, Tensor]:
        """Return the features [N, D] and the classes [N] of rows whose answers are known."""
        labels = [closed.classes[self._normalize(row.answers[0])] for row in rows]
        return torch.from_numpy(vectors(rows)).double(), torch.tensor(labels)


def worse_than_probe(adapter: Evaluation, probe: Sequence[Prediction | None], metrics: Sequence[Metric]) -> list[str]:
    """Return a warning if the adapter is clearly worse than the linear probe on the rows that both predict.

    It compares all these rows, and those of each question type, by the first metric if its value is a share.

    Args:
        adapter: the evaluation of the adapter.
        probe: one prediction a row of that evaluation, or None.
        metrics: the metrics of the task.
    """
    first = metrics[0]
    pairs = [(row, found) for row, found in zip(adapter.rows, probe, strict=True) if found is not None]
    examples = [row.example for row, _ in pairs]
    own = Measured([first], examples, [row.prediction for row, _ in pairs])
    fitted = Measured([first], examples, [found for _, found in pairs])
    rows_of: dict[str, list[int]] = {}
    for i, example in enumerate(examples):
        rows_of.setdefault(example.question_type, []).append(i)
    worse = []
    parts = {"all rows that the probe covers": [*range(len(examples))]} if examples else {}
    if len(rows_of) > 1:
        parts |= {safe_line(f"question type {name}"): rows for name, rows in rows_of.items()}
    for name, rows in parts.items():
        ours, probes = (measured.values(rows).get(first.key) for measured in (own, fitted))
        if ours is None or probes is None or ours.unit is not None:
            continue
        lead = probes.value - ours.value if first.higher_is_better else ours.value - probes.value
        if lead > _MARGIN + _ROUNDING:
            worse.append(f"{ours.value:.3f} against {probes.value:.3f} on {len(rows)} test rows ({name})")
    if not worse:
        return []
    return [
        f"a linear probe on the image features of the frozen base beats the adapter: {words(first.key)} "
        f"{'; '.join(worse)}. The features tell these answers apart better than the adapter does. Train for more "
        "epochs, or choose among the fixed answers instead of generating them"
    ]


def _by_question(rows: Sequence[Example]) -> dict[str, list[int]]:
    """Return each question, which is a whole prompt, with the numbers of the rows that ask it about an image."""
    found: dict[str, list[int]] = {}
    for i, row in enumerate(rows):
        if row.images:
            found.setdefault(str(row.prompt), []).append(i)
    return found
