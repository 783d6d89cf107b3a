"""The embedded base: small, loaded like any hub model, and as good as its card says."""

from dataclasses import replace

import pytest
import torch
from transformers import AutoModelForImageTextToText, AutoProcessor

from finetune.assemble.loading import load_base
from finetune.evaluation.evaluate import evaluate_rows
from finetune.evaluation.predict import Predictor
from finetune.evaluation.scores import Scores, Value
from finetune.pocket import model_folder
from finetune.pocket.card import shortfalls, write_card
from finetune.pocket.domains import read_world
from finetune.pocket.pretrain import PretrainOptions, pretrain
from finetune.tasks.vqa import VqaConfig


def pocket_scores(rows, *, batch_size):
    base = load_base("pocket", device="cpu")
    task = base.task(VqaConfig(answer_normalization="vqa"))
    predictor = Predictor(model=base.model, task=task, prompt_batch=base.collator.prompt_batch, batch_size=batch_size)
    scores, _ = evaluate_rows(predictor, rows)
    return scores


def test_it_loads_like_any_model_in_full_precision():
    model = AutoModelForImageTextToText.from_pretrained(model_folder())
    processor = AutoProcessor.from_pretrained(model_folder())
    assert type(model).__name__ == "FastVlmForConditionalGeneration" and model.dtype == torch.float32
    assert (model_folder() / "model.safetensors").stat().st_size < 8e6
    for text in ("naïve 漢字 \t x̂ 100%", "Is there a lesion?"):
        assert processor.tokenizer.decode(processor.tokenizer.encode(text)) == text
    assert len(processor.tokenizer.encode("2024")) == 4, "digits stand alone"


def test_it_sees():
    """A small sample of what its card measures; chance is far below."""
    rows = read_world(1, "test", rows_per_type=12, task=VqaConfig(answer_normalization="vqa"))
    scores = pocket_scores(rows, batch_size=72)
    assert scores.first.value > 0.8 and scores.baselines["blank_image"]["exact_match"].value < 0.45


@pytest.mark.slow
def test_it_keeps_what_its_card_promises():
    rows = read_world(2, "test", rows_per_type=150, task=VqaConfig(answer_normalization="vqa"))
    scores = pocket_scores(rows, batch_size=100)
    assert shortfalls(scores.to_json()) == []


def test_shortfalls_are_named():
    def part(value, blank_image, majority):
        baselines = {
            "blank_image": {"exact_match": measured(blank_image)},
            "majority": {"exact_match": measured(majority)},
        }
        return Scores(values={"exact_match": measured(value)}, baselines=baselines, n=10, truncated=0)

    def measured(value):
        return Value(value=value, interval=(0.1, 0.9), n=10, unit=None, higher_is_better=True)

    scores = replace(part(0.7, 0.5, 0.3), by_question_type={"size": part(0.6, 0.5, 0.4)}).to_json()
    card = write_card(scores, parameters=1_500_000, minutes=None)
    assert "10 questions: **0.700** (0.100 to 0.900); with a grey image 0.500; majority" in card
    assert card.endswith("| size | 0.600 | 0.500 | 0.400 | 10 |\n")
    assert shortfalls(scores) == [
        "overall 0.700 is below 0.75",
        "a blank image costs only 0.200",
        "size: 0.600 against 0.500 without the image",
    ]


@pytest.mark.slow
def test_pretraining_runs_and_goes_on_from_its_checkpoint(tmp_path):
    options = {"folder": tmp_path, "batch_size": 4, "images": 16, "vision_steps": 2, "checkpoint_minutes": 0.0}
    pretrain(PretrainOptions(steps=3, **options))
    lines = (tmp_path / "log.jsonl").read_text().splitlines()
    model = pretrain(PretrainOptions(steps=4, **options))
    assert torch.load(tmp_path / "checkpoint.pt", weights_only=True)["step"] == 4
    assert len((tmp_path / "log.jsonl").read_text().splitlines()) == len(lines), "it did not begin again at step 0"
    assert model.dtype == torch.float32
    assert load_base(str(tmp_path / "model"), device="cpu").model.dtype == torch.float32
