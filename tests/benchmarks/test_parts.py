"""Rows, models and the gate of the benchmark."""

from pathlib import Path

import pytest
import torch
from transformers import AutoProcessor

from benchmarks.gate import Gate, Ready
from benchmarks.models import SETUPS, save_smolvlm, save_tiny
from benchmarks.rows import ANSWER_TOKENS, QUESTION, read_rows, write_rows

TINY_VISION = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}
TINY_TEXT = {
    "vocab_size": 1300,
    "hidden_size": 48,
    "intermediate_size": 64,
    "num_hidden_layers": 1,
    "num_attention_heads": 3,
    "num_key_value_heads": 3,
}


@pytest.mark.parametrize("name", ["a", "tiny"])
def test_every_row_has_the_same_number_of_supervised_tokens(name, tmp_path):
    from finetune.assemble.loading import load_base
    from finetune.data.jsonl import read_jsonl
    from finetune.data.splits import tally
    from finetune.recipe import JsonlData
    from finetune.tasks.vqa import VqaConfig

    base = load_base(str(SETUPS[name].save(tmp_path / "base", torch.float32)), device="cpu")
    folder = write_rows(tmp_path / "rows", SETUPS[name], base.processor.tokenizer, num_rows=4)
    section = JsonlData(source="jsonl", root=str(folder))

    bad = tally(section, "train", log=print)
    examples = read_jsonl(section, "train", task=VqaConfig(), seed=0, bad=bad)
    batch = base.collator.training_batch(examples)
    assert (batch.labels != -100).sum(dim=1).tolist() == [ANSWER_TOKENS] * 4
    assert batch.inputs["attention_mask"].all()
    pixels = batch.inputs["pixel_values"]
    assert all(not torch.equal(pixels[0], pixels[i]) for i in range(1, 4))


def test_rows_are_a_function_of_the_seed(tmp_path):
    tokenizer = AutoProcessor.from_pretrained(save_tiny(tmp_path / "base", torch.float32)).tokenizer
    first, again, other = (
        read_rows(write_rows(tmp_path / name, SETUPS["tiny"], tokenizer, num_rows=2, seed=seed))
        for name, seed in (("first", 0), ("again", 0), ("other", 1))
    )
    assert [row["answer"] for row in first] == [row["answer"] for row in again] != [row["answer"] for row in other]
    images = [Path(rows[0]["image"]).read_bytes() for rows in (first, again, other)]
    assert images[0] == images[1] != images[2]


def test_four_tiles_are_five_passes_of_the_tower(tmp_path):
    from PIL import Image

    folder = save_smolvlm(tmp_path, torch.float32, tiles=2, side=64, vision=TINY_VISION, text=TINY_TEXT)
    processor = AutoProcessor.from_pretrained(folder)
    inputs = processor(text=[f"<image>{QUESTION}"], images=[[Image.new("RGB", (128, 128))]], return_tensors="pt")
    assert inputs["pixel_values"].shape == (1, SETUPS["b4"].tiles_per_image, 3, 64, 64)
    assert (inputs["input_ids"] == processor.image_token_id).sum() == 5  # (64 / 16 / 4) ** 2 of each


class Connection:
    """Answers at once and remembers what it was told."""

    def __init__(self):
        self.sent = []

    def send(self, what):
        self.sent.append(what)

    def recv(self):
        return "go"


def test_the_gate_reports_after_each_round_and_counts_in_the_first():
    connection = Connection()
    gate = Gate(connection, 2, counts_flops=True)
    model = torch.nn.Linear(4, 3)
    model.bias.requires_grad_(False)
    gate.ready(model, fill_seconds=1.5)
    for step in range(4):
        model(torch.ones(2, 4)).sum()
        gate.step(torch.tensor(float(step)), 24)
    ready, first, second = connection.sent
    assert ready == Ready(trainable=12, fill_seconds=1.5)
    assert (first.losses, second.losses) == ([0.0, 1.0], [2.0, 3.0])
    assert first.supervised == second.supervised == [24, 24]
    assert (first.flops, second.flops) == (2 * 2 * 2 * 4 * 3, 0)  # two steps, an addition with each product
    assert first.seconds > 0 <= first.cpu_seconds
