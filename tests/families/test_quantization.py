"""A quantized base: only its language tower, by full path; adapters move between it and the full-precision base."""

import pytest
import torch

from finetune.assemble.loading import load_base
from finetune.errors import MethodError, RecipeError
from finetune.families.quantization import quantized_modules
from finetune.methods.adapter import attach, detach, merge, updates
from finetune.pocket import model_folder
from finetune.runs.saving import describe
from finetune.runs.train import train
from finetune.serving.loading import load
from tests.matrix import LORA, logits, recipe_of, reload_cell, rows, train_cell


@pytest.mark.parametrize("quantization", ["4bit", "8bit"])
def test_the_language_tower_alone_is_quantized_on_every_family(tiny_family, quantization):
    base = load_base(str(tiny_family), device="cpu", quantization=quantization)
    (language,) = base.towers["language"]
    linears = {
        name
        for name, module in base.model.named_modules()
        if isinstance(module, torch.nn.Linear) and name.startswith(f"{language}.")
    }
    assert set(quantized_modules(base.model)) == linears


@pytest.mark.parametrize("quantization", ["4bit", "8bit"])
def test_an_adapter_moves_between_quantized_and_full_precision(tmp_path, quantization):
    base = model_folder()  # real weights: rounding those of a random model would change most of what it says
    cell = train_cell(base, LORA, tmp_path, quantization=quantization)
    assert reload_cell(cell)["reloaded"]
    adapter = load(tmp_path / "adapter", base=str(base), device="cpu").adapter
    assert adapter.probe.verdict == "passed"
    assert 0 < adapter.probe.difference < 0.5  # of the recorded effect: the gap that quantization makes


def test_merging_into_quantized_weights_is_refused(tiny_fast_vlm, tmp_path):
    base = load_base(str(tiny_fast_vlm), device="cpu", quantization="4bit")
    batch = base.collator.training_batch(rows())
    attachment = attach(base.host, recipe_of(LORA, tiny_fast_vlm, tmp_path).method)
    found = updates(base.model, describe(attachment, "fast_vlm"), attachment.parameters)
    detach(base.model)
    before = logits(base, batch)
    with pytest.raises(MethodError, match="an adapter must be merged into a 16 or 32 bit base, but .* is quantized"):
        merge(found)
    assert torch.equal(logits(base, batch), before)


def test_dora_on_8_bit_is_refused_when_the_recipe_is_read(tiny_fast_vlm, tmp_path):
    with pytest.raises(RecipeError, match="lora.use_dora cannot be used with 8bit: .* Use model.quantization: 4bit"):
        recipe_of({**LORA, "use_dora": True}, tiny_fast_vlm, tmp_path, quantization="8bit")


def test_a_run_logs_what_is_quantized(tiny_fast_vlm, make_recipe, capsys):
    train(make_recipe(tiny_fast_vlm, model={"quantization": "4bit"}, train={"max_steps": 1}))
    assert "quantized to 4bit: 14 linear modules, model.language_model.layers.0" in capsys.readouterr().out
