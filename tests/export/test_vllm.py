"""LoRA in vLLM's form, or refused with the reason. ``tests/vllm`` asks vLLM's own code the same questions."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from finetune.adapters.folder import read_folder
from finetune.adapters.manifest import AdapterManifest
from finetune.adapters.peft_format import peft_config
from finetune.assemble.loading import load_base
from finetune.cli import main
from finetune.errors import ExportError, ManifestError
from finetune.export.exporting import export_adapter
from finetune.export.vllm_rules import (
    LAYERS,
    MAX_LORA_RANKS,
    PROJECTIONS,
    WITHOUT_LORA,
    refuse_for_vllm,
    vllm_form,
)
from finetune.methods.targets import resolve_targets
from finetune.tables import FAMILIES
from tests.matrix import LORA, recipe_of


@pytest.fixture(scope="module")
def manifest(saved):
    """Of a LoRA of rank 4 on all linear modules of a LLaVA's language model."""
    return read_folder(saved("llava", "lora")[1]).manifest


def changed(manifest, *, method="lora", model_type="llava", modules=None, **options):
    """The manifest of another adapter, as far as rules look at it."""
    raw = manifest.model_dump()
    (part,) = raw["adapter"]["parts"]
    part["method"], raw["base"]["model_type"] = method, model_type
    part["options"] |= options
    part["modules"] = modules or part["modules"]
    return AdapterManifest.model_validate(raw)


def refusal(manifest, max_lora_rank=16):
    with pytest.raises(ExportError) as error:
        refuse_for_vllm(manifest, max_lora_rank=max_lora_rank)
    return str(error.value)


@pytest.mark.parametrize("kind", ["wide lora", "lora"])
def test_scaling_stands_in_the_weights_and_names_are_transformers(saved, tmp_path, kind):
    base, adapter = saved("llava", kind)
    done = export_adapter(adapter, to="vllm", output=tmp_path / "out", base=base)
    assert done.verdict == "passed"
    config = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert config["lora_alpha"] == config["r"] and not config["use_rslora"]
    assert config["bias"] == "none" and config["modules_to_save"] is None
    tensors = load_file(tmp_path / "out" / "adapter_model.safetensors")
    assert all(name.startswith(f"base_model.model.{LAYERS['llava']}") for name in tensors)
    wanted, _ = vllm_form(read_folder(adapter))
    assert tensors.keys() == wanted.keys()
    assert all(torch.equal(tensors[name], wanted[name]) for name in tensors)
    assert 'LoRARequest("testing/cell", 1, "FOLDER")' in (tmp_path / "out" / "README.md").read_text()


def test_every_family_has_a_rule():
    assert sorted([*LAYERS, *WITHOUT_LORA]) == sorted(FAMILIES)


def test_all_linear_is_what_it_serves(tiny_family, tmp_path):
    base = load_base(str(tiny_family), device="cpu")
    model_type = base.identity.model_type
    modules, _ = resolve_targets(base.host, recipe_of(LORA, tiny_family, tmp_path).method[0].towers)
    if model_type in WITHOUT_LORA:
        return
    assert modules.keys() == {"language"}
    for name in modules["language"]:
        assert name.startswith(LAYERS[model_type]) and name.rpartition(".")[2] in PROJECTIONS


def test_a_dual_encoder_is_refused_before_its_base_is_loaded(saved, tmp_path):
    _, adapter = saved("clip", "lora")
    with pytest.raises(ExportError, match="it supports no LoRA on clip. Instead, merge the adapter into its base"):
        export_adapter(adapter, to="vllm", output=tmp_path / "out", base="/nowhere")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("model_type", ["llava_onevision", "clip"])
def test_no_lora_on_this_architecture(manifest, model_type):
    assert f"it supports no LoRA on {model_type}" in refusal(changed(manifest, model_type=model_type))


def test_an_architecture_that_was_never_tried(manifest):
    assert "LoRA was tested there on fast_vlm, gemma3" in refusal(changed(manifest, model_type="mllama"))


@pytest.mark.parametrize("method", ["prompt_tuning", "full_modules"])
def test_lora_is_all(manifest, method):
    assert f"it serves only LoRA, got {method}." in refusal(changed(manifest, method=method))


def test_no_dora(manifest):
    assert "it supports no DoRA. Train with method.use_dora: false, or merge the adapter" in refusal(
        changed(manifest, use_dora=True)
    )


@pytest.mark.parametrize(
    "name",
    [
        "model.vision_tower.vision_model.encoder.layers.0.self_attn.q_proj",
        "model.multi_modal_projector.linear_1",
        "model.language_model.layers.0.mlp.experts",
        "model.language_model.embed_tokens",
        "lm_head",
    ],
)
@pytest.mark.parametrize("tower", ["language", "vision"])
def test_modules_that_it_would_refuse_or_drop(manifest, name, tower):
    (part,) = manifest.adapter.parts
    modules = {"language": list(part.names)}
    modules.setdefault(tower, []).append(name)
    text = refusal(changed(manifest, modules=modules))
    assert f"ignore 1 of the {len(part.names) + 1} modules that the adapter changes, such as '{name}'" in text


def test_rank(manifest):
    name = manifest.adapter.parts[0].names[0]
    refuse_for_vllm(changed(manifest, r=16), max_lora_rank=16)
    assert "ranks must be at most --max-lora-rank 16, got 17. Set --max-lora-rank 32" in refusal(
        changed(manifest, r=17)
    )
    pattern = changed(manifest, rank_pattern={name: 300})
    assert "ranks must be at most --max-lora-rank 256, got 300. Set --max-lora-rank 320" in refusal(pattern, 256)
    assert "vLLM has no larger one. Instead, merge" in refusal(changed(manifest, r=513), 512)
    assert "--max-lora-rank must be one of 1, 8, 16, 32, 64, 128, 256, 320, 512, got 17" in refusal(manifest, 17)
    assert refusal(manifest, 17).count(str(MAX_LORA_RANKS[-1])) == 1


FIRST = "model.language_model.layers.0.self_attn.q_proj"


@pytest.mark.parametrize(
    "options",
    [{"r": "4"}, {"r": True}, {"rank_pattern": {"x": 3}}, {"rank_pattern": {FIRST: "3"}}, {"use_dora": "no"}],
    ids=["text", "bool", "no module", "text of a module", "no bool"],
)
def test_options_of_another_kind(manifest, options):
    with pytest.raises(ManifestError, match="r must be|rank|use_dora"):
        refuse_for_vllm(changed(manifest, **options), max_lora_rank=16)


def test_no_manifest_has_a_bias_or_modules_to_save(manifest):
    config = peft_config(manifest.adapter)
    assert (config["bias"], config["modules_to_save"]) == ("none", None)
    assert "init_lora_weights" not in config and "layer_replication" not in config


def test_the_command(saved, tmp_path, capsys):
    base, adapter = saved("llava", "wide lora")
    words = ["export", str(adapter), "--to", "vllm", "--output", str(tmp_path / "out"), "--base", base]
    assert main([*words, "--max-lora-rank", "8"]) == 2
    assert "at most --max-lora-rank 8, got 12. Set --max-lora-rank 16, in vLLM and here." in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
    assert main(words) == 0
    assert (tmp_path / "out" / "export.json").exists()


def test_the_command_of_the_page(saved, tmp_path, monkeypatch):
    page = (Path(__file__).parents[2] / "docs" / "vllm.md").read_text()
    (line,) = [line for line in page.splitlines() if line.startswith("finetune export ")]
    base, adapter = saved("llava", "lora")
    words = [str(adapter) if word.startswith("medical/") else word for word in line.split()[1:]]
    monkeypatch.chdir(tmp_path)
    assert main([*words, "--base", base]) == 0
    assert (tmp_path / "brain-mri" / "adapter_config.json").exists()
    for model_type in LAYERS:
        assert f"`{model_type}`" in page
