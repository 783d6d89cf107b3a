"""What a base alone predicts is made once, and again when anything that could change it has changed."""

from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from finetune.adapters.manifest import BaseIdentity, ProcessorDigests
from finetune.core.example import Example, answer, as_images, ask
from finetune.core.prediction import Text
from finetune.evaluation.base_predictions import BasePredictions
from finetune.evaluation.predict import Predictor, blanked
from finetune.tasks.vqa import VqaConfig

ZERO, ONE = "0" * 64, "1" * 64
ROWS = [
    Example(
        id=str(i),
        messages=[*ask(f"q{i}"), answer("a")],
        media=as_images([np.full((4, 4, 3), i, np.uint8)]),
        answers=["a"],
        meta={"question_type": "all"},
    )
    for i in range(3)
]


def base(**changes):
    model = SimpleNamespace(
        dtype=torch.float32, device=torch.device("cpu"), config=SimpleNamespace(_attn_implementation="sdpa")
    )
    parts = dict.fromkeys(("tokenizer", "processor_config", "chat_template", "generation_config"), ZERO)
    found = {
        "model": model,
        "quantization": None,
        "identity": BaseIdentity(model_type="toy", files={"model.safetensors": ZERO}, config=ZERO),
        "digests": ProcessorDigests(**parts),
    }
    return SimpleNamespace(**(found | changes))


class Asked:
    """A task that counts the rows that it is asked."""

    def __init__(self):
        self.rows = 0

    def predict(self, model, batch):
        self.rows += len(batch.examples)
        return [Text(text=f"said of {example.id}") for example in batch.examples]


class Rows:
    def __init__(self, examples):
        self.examples = examples

    def to(self, device, dtype):
        return self


def ask_base(examples=ROWS, *, changed=None, task=None, batch_size=2, processes=1):
    asked, one = Asked(), changed or base()
    kept = BasePredictions(one, task or VqaConfig(), batch_size, processes)
    predictor = Predictor(model=one.model, task=asked, prompt_batch=Rows, batch_size=batch_size, kept=kept)
    found = predictor(examples, title="asking")
    assert found == [Text(text=f"said of {example.id}") for example in examples]
    return asked.rows


def test_they_are_made_once():
    assert ask_base() == 3
    assert ask_base() == 0
    assert ask_base(task=VqaConfig(answer_normalization="vqa", metrics=["exact_match"])) == 0, "compared otherwise only"


OTHER = ROWS[:2] + [replace(ROWS[2], media=as_images([np.full((4, 4, 3), 9, np.uint8)]))]


@pytest.mark.parametrize(
    "changes",
    [
        {"changed": base(identity=BaseIdentity(model_type="toy", files={"model.safetensors": ONE}, config=ZERO))},
        {"changed": base(quantization="4bit")},
        {"task": VqaConfig(max_new_tokens=3)},
        {"task": VqaConfig(system_prompt="Be brief.")},
        {"batch_size": 3},
        {"processes": 2},
        {"examples": OTHER},
        {"examples": ROWS[::-1]},
        {"examples": blanked(ROWS)[0]},
    ],
)
def test_whatever_could_change_them_makes_them_anew(changes):
    assert ask_base() == 3
    assert ask_base(**changes) == 3


def test_a_damaged_note_is_none(tmp_path):
    assert ask_base() == 3
    (note,) = (tmp_path / "cache" / "predictions").iterdir()
    note.write_bytes(note.read_bytes()[:-4])
    assert ask_base() == 3
    assert ask_base() == 0
