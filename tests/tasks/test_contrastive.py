"""The contrastive task: which label is predicted, and what objectives are computed from."""

import math

import pytest
import torch

from finetune.core.batch import Batch
from finetune.tasks.contrastive import ContrastiveConfig, ContrastiveTask


def test_a_prediction_is_the_label_of_the_closest_text():
    task = ContrastiveTask(ContrastiveConfig(name="contrastive"), None)

    class Model:
        def __call__(self, **inputs):
            # texts in the order of the rows' choices: a red thing, a blue thing, a hat
            similarity = torch.tensor([[1.0, 2.0, 9.0], [0.0, 2.0, 3.0]])
            return type("Output", (), {"logits_per_image": similarity})

    class Row:
        def __init__(self, **choices):
            self.choices = choices

    colours = {"red": "a red thing", "blue": "a blue thing"}
    batch = Batch({}, [Row(**colours), Row(hat="a hat", red="a red thing")])
    predictions = task.predict(Model(), batch)
    assert [prediction.label for prediction in predictions] == ["blue", "hat"]
    # Of the row's own labels alone: e^0 : e^1, and e^3 : e^0.
    assert predictions[0].scores == pytest.approx({"red": 1 / (1 + math.e), "blue": math.e / (1 + math.e)})
    assert predictions[1].scores == pytest.approx({"hat": math.e**3 / (1 + math.e**3), "red": 1 / (1 + math.e**3)})
