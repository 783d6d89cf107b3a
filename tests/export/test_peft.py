"""A folder for PEFT: opened by PEFT's and transformers' own functions, or refused with the reason."""

import json

import pytest
import torch
import yaml
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForImageTextToText

from finetune.assemble.loading import load_base
from finetune.errors import ExportError
from finetune.export.exporting import export_adapter
from finetune.export.parity import outputs, rows_of
from finetune.serving.loading import load
from tests.scores import scores_json


def wanted_and_rows(base, adapter):
    vlm = load(adapter, base=base, device="cpu")
    rows = rows_of(vlm.base, vlm.adapter.manifest.probe)
    return outputs(vlm.base, rows, vlm.adapter.placeholders), rows


def off(model, family, rows, wanted):
    with torch.no_grad():
        found = {name: family.outputs(model, row.inputs)[0] for name, row in rows.items()}
    return max((found[name] - wanted[name][-len(found[name]) :]).abs().max().item() for name in rows)


@pytest.mark.parametrize("kind", ["lora", "patterns", "rslora", "dora", "prompt"])
def test_plain_peft_opens_it(saved, tmp_path, kind):
    base, adapter = saved("llava", kind)
    done = export_adapter(adapter, to="peft", output=tmp_path / "out", base=base)
    assert done.verdict == "passed"
    wanted, rows = wanted_and_rows(base, adapter)
    family = load_base(base, device="cpu").family
    model = AutoModelForImageTextToText.from_pretrained(base)
    plain = off(model, family, rows, wanted)
    opened = PeftModel.from_pretrained(model, tmp_path / "out").eval()
    assert off(opened, family, rows, wanted) < 1e-5 < 0.1 < plain
    (row, *_) = rows.values()
    if kind != "prompt":  # PEFT warns of position ids that it ignores
        assert opened.generate(**row.inputs, max_new_tokens=2).shape[0] == 1


@pytest.mark.parametrize("kind", ["patterns", "rslora", "dora"])
@pytest.mark.parametrize("opener", ["peft", "transformers"])
def test_baked_scaling_needs_no_pattern(saved, tmp_path, kind, opener):
    base, adapter = saved("llava", kind)
    export_adapter(adapter, to="peft", output=tmp_path / "out", base=base, bake_scaling=True)
    config = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert config["lora_alpha"] == config["r"] == 4
    assert not (config["rank_pattern"] or config["alpha_pattern"] or config["use_rslora"])
    tensors = load_file(tmp_path / "out" / "adapter_model.safetensors")
    assert {len(tensor) for name, tensor in tensors.items() if "lora_A" in name} == {4}
    wanted, rows = wanted_and_rows(base, adapter)
    family = load_base(base, device="cpu").family
    model = AutoModelForImageTextToText.from_pretrained(base)
    if opener == "peft":
        model = PeftModel.from_pretrained(model, tmp_path / "out")
    else:
        model.load_adapter(str(tmp_path / "out"))
    assert off(model.eval(), family, rows, wanted) < 1e-4


def test_a_dual_encoder(saved, tmp_path):
    base, adapter = saved("clip", "lora")
    export_adapter(adapter, to="peft", output=tmp_path / "out", base=base)
    card = (tmp_path / "out" / "README.md").read_text()
    assert "base = AutoModel.from_pretrained" in card and "Texts of the training: `{label}`" in card


def test_the_card(saved, tmp_path):
    base, adapter = saved()
    manifest = json.loads((adapter / "manifest.json").read_text())
    scores = scores_json(0.25, interval=(0.125, 0.5))
    manifest |= {"metrics": {"test": scores}, "license": "MIT", "intended_use": "to tell `red` from blue"}
    manifest["base"] |= {"hub_id": "toy/llava", "revision": "abc"}
    manifest["task"] |= {"question_template": "Look:\n{question}", "system_prompt": "Be `short`."}
    (tmp_path / "a").mkdir()
    for name in manifest["files"]:
        (tmp_path / "a" / name).write_bytes((adapter / name).read_bytes())
    (tmp_path / "a" / "manifest.json").write_text(json.dumps(manifest))
    export_adapter(tmp_path / "a", to="peft", output=tmp_path / "out", base=base)
    _, front, page = (tmp_path / "out" / "README.md").read_text().split("---\n", 2)
    front = yaml.safe_load(front)
    assert front["base_model"] == "toy/llava" and front["base_model_relation"] == "adapter"
    assert front["library_name"] == "peft" and front["license"] == "mit"
    assert front["model-index"][0]["results"][0]["metrics"][0] == {"type": "exact_match", "value": 0.25}
    assert 'AutoModelForImageTextToText.from_pretrained("toy/llava", revision="abc")' in page
    assert "| exact_match |  | 0.25 (0.125 to 0.5) |" in page and "| majority.exact_match |  | 0.5 |" in page
    assert "Prompt of the training, image first: `Look: {question}`, after the system prompt `` Be `short`. ``" in page
    assert "Intended use: `` to tell `red` from blue ``" in page
    assert "Limits: trained and evaluated only on testing" in page
    config = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert (config["base_model_name_or_path"], config["revision"]) == ("toy/llava", "abc")


@pytest.mark.parametrize(
    ("family", "kind", "message"),
    [
        (
            "llava",
            "everything",
            r"holds lora\+full_modules\+prompt_tuning, and PEFT's .* Load it with finetune.load\(...\)\.",
        ),
        ("llava", "full_modules", "PEFT's format holds no full_modules. .* or export it as a whole model: --to merged"),
        ("qwen3_vl", "prompt", "drops the token ids, and a qwen3_vl needs them for its positions or masks"),
    ],
)
def test_what_peft_cannot_express_is_refused_before_the_base_is_loaded(saved, tmp_path, family, kind, message):
    _, adapter = saved(family, kind)
    with pytest.raises(ExportError, match=message):
        export_adapter(adapter, to="peft", output=tmp_path / "out", base="/nowhere")
    assert not list(tmp_path.glob("*out*"))


def test_a_prompt_has_no_scaling(saved, tmp_path):
    base, adapter = saved("llava", "prompt")
    with pytest.raises(ExportError, match="bake_scaling needs a LoRA, got prompt_tuning .*. Leave it out"):
        export_adapter(adapter, to="peft", output=tmp_path / "out", base=base, bake_scaling=True)


def test_a_weight_that_is_not_written_as_it_was_is_found(saved, tmp_path, monkeypatch):
    base, adapter = saved()

    def flip(path):
        tensors = load_file(path)
        name = next(name for name in tensors if "lora_B" in name)
        tensors[name].view(torch.int32)[0, 0] ^= 1  # its last bit
        return tensors

    monkeypatch.setattr("finetune.export.peft.load_file", flip)
    with pytest.raises(ExportError, match="must have .* effect, but differs, so no files were kept. failed: the 28"):
        export_adapter(adapter, to="peft", output=tmp_path / "out", base=base)
    assert not list(tmp_path.glob("*out*"))


def test_what_peft_cannot_open_is_an_error_of_ours(saved, tmp_path, monkeypatch):
    base, adapter = saved()
    monkeypatch.setattr(
        "finetune.export.peft.config_bytes", lambda c: json.dumps(c | {"target_modules": ["x"]}).encode()
    )
    with pytest.raises(ExportError, match="PEFT cannot load the written files: Target modules {'x'} not found"):
        export_adapter(adapter, to="peft", output=tmp_path / "out", base=base)


def test_a_config_by_which_peft_computes_otherwise_is_found(saved, tmp_path, monkeypatch):
    base, adapter = saved()
    monkeypatch.setattr("finetune.export.peft.config_bytes", lambda c: json.dumps(c | {"lora_alpha": 17}).encode())
    with pytest.raises(ExportError, match="failed: PEFT on the same base with the adapter: largest difference"):
        export_adapter(adapter, to="peft", output=tmp_path / "out", base=base)
    assert not list(tmp_path.glob("*out*"))
