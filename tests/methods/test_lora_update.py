"""A finished LoRA gives PEFT's outputs bit for bit, and wraps nothing."""

import pytest
import torch
from peft import PeftModel
from torch import nn

from finetune.adapters.folder import read_folder
from finetune.assemble.loading import load_base
from finetune.errors import ManifestError
from finetune.methods.adapter import expected_tensors, updates
from finetune.methods.hooks import ActiveAdapter, AdapterHooks, reached
from finetune.methods.lora_update import DoraUpdate
from tests.matrix import logits, rows
from tests.serving.adapters import make_adapter

HELD = {
    "float32": {},
    "bfloat16": {"dtype": "bfloat16"},
    "4bit": {"quantization": "4bit"},
    "8bit": {"quantization": "8bit"},
    "4bit in bfloat16": {"quantization": "4bit", "dtype": "bfloat16"},
}


@pytest.fixture(scope="module")
def adapters(tiny_fast_vlm, tmp_path_factory):
    """Method -> the folder of an adapter."""
    folder, base = tmp_path_factory.mktemp("adapters"), load_base(str(tiny_fast_vlm), device="cpu")
    return {kind: make_adapter(base, kind, folder / kind) for kind in ("lora", "patterns", "rslora", "dora")}


@pytest.mark.parametrize("kind", ["lora", "patterns", "rslora", "dora"])
@pytest.mark.parametrize("held", HELD)
def test_outputs_are_pefts_bit_for_bit(tiny_fast_vlm, adapters, kind, held):
    ours, theirs = (load_base(str(tiny_fast_vlm), device="cpu", **HELD[held]) for _ in range(2))
    folder = read_folder(adapters[kind])
    if (kind, held) == ("dora", "8bit"):
        with pytest.raises(
            ManifestError, match="the adapter is a DoRA, .* the base holds it in 8 bit.*quantization='4bit'"
        ):
            expected_tensors(ours.model, ours.towers, folder.manifest.adapter)
        return
    batch = ours.collator.training_batch(rows()).to("cpu", ours.model.dtype)
    plain = logits(ours, batch)
    found = updates(ours.model, folder.manifest.adapter, folder.tensors)
    hooks = AdapterHooks()
    hooks.add(found)
    assert torch.equal(logits(ours, batch), plain)
    with hooks.using(ActiveAdapter(updates=found)):
        mine = logits(ours, batch)
    PeftModel.from_pretrained(theirs.model, adapters[kind])
    assert torch.equal(mine, logits(theirs, batch))
    assert not torch.allclose(mine, plain, atol=1e-2)
    hooks.remove(found)
    assert torch.equal(logits(ours, batch), plain) and not reached(ours.model)


def test_dora_on_a_layer_with_a_bias_is_pefts():
    from peft import LoraConfig, inject_adapter_in_model

    linear = nn.Linear(12, 7).requires_grad_(False)
    peft = nn.Sequential(linear)
    inject_adapter_in_model(LoraConfig(r=3, lora_alpha=5, target_modules=["0"], use_dora=True), peft)
    layer = peft[0]
    nn.init.normal_(layer.lora_B["default"].weight)
    magnitude = layer.lora_magnitude_vector["default"].weight
    magnitude.data *= torch.rand(7) + 0.5
    x = torch.randn(2, 5, 12)
    with torch.no_grad():
        theirs = peft.eval()(x)
        weights = (layer.lora_A["default"].weight, layer.lora_B["default"].weight)
        update = DoraUpdate(linear, *(w.detach() for w in weights), 5 / 3, magnitude.detach())
        assert torch.equal(update(linear.forward, x), theirs)
        update.merging("0")()
        assert torch.allclose(linear(x), theirs, atol=1e-5)
