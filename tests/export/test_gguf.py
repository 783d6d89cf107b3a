"""A LoRA for llama.cpp: every family that can go there, every adapter that cannot, and damage on the way."""

import gguf
import numpy as np
import pytest
import torch

from finetune.adapters.folder import read_folder
from finetune.core import extras
from finetune.errors import ExportError, MissingExtraError
from finetune.export import gguf as target
from finetune.export.exporting import export_adapter
from finetune.export.llama_cpp import ARCHITECTURES, LoraFile
from finetune.methods.lora_update import LoraUpdate

FAMILIES = {
    "fast_vlm": "qwen2",
    "gemma3": "gemma3",
    "idefics3": "llama",
    "internvl": "qwen2",
    "llava": "llama",
    "llava_onevision": "qwen2",
    "qwen2_5_vl": "qwen2vl",
    "qwen3_vl": "qwen3vl",
    "smolvlm": "llama",
}
TURNED = ("self_attn.q_proj", "self_attn.k_proj")


def by_hand(module, up, architecture, *, heads=2):
    """B as llama.cpp wants it, row by row."""
    if architecture != "llama" or not module.endswith(TURNED):
        return up
    half = len(up) // heads // 2
    return up[[head * 2 * half + side * half + i for head in range(heads) for i in range(half) for side in (0, 1)]]


@pytest.mark.parametrize(("family", "architecture"), FAMILIES.items())
def test_every_family_whose_language_model_llama_cpp_runs(saved, tmp_path, family, architecture):
    base, adapter = saved(family)
    done = export_adapter(adapter, to="gguf", output=tmp_path / "out", base=base)
    assert done.verdict == "passed"
    reader = gguf.GGUFReader(tmp_path / "out" / "adapter.gguf")
    assert reader.fields["general.architecture"].contents() == architecture
    assert reader.fields["adapter.lora.alpha"].contents() == 4.0
    held, source = (
        {tensor.name: torch.from_numpy(np.array(tensor.data)) for tensor in reader.tensors},
        read_folder(adapter),
    )
    modules = source.manifest.adapter.parts[0].names
    assert len(held) == 2 * len(modules) == 28
    for module in modules:
        place, leaf = module.split(".layers.")[1].split(".", 1)
        name = f"blk.{place}.{NAMES[leaf]}.weight"
        down, up = (source.tensors[f"base_model.model.{module}.lora_{kind}.weight"] for kind in "AB")
        assert torch.equal(held[f"{name}.lora_a"], down)
        assert torch.equal(held[f"{name}.lora_b"], by_hand(module, up * 4, architecture))  # lora_alpha / r is 16 / 4


NAMES = {
    "self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output", "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}  # fmt: skip


def test_families_of_the_table_are_tried():
    assert set(FAMILIES.values()) == set(ARCHITECTURES.values()) - {"qwen3"}  # inside internvl, by its config


def test_scaling_stands_in_b_and_one_alpha_does_for_all(saved, tmp_path):
    base, adapter = saved("idefics3", "wide lora")  # rank 12 with rslora, on two linear modules a layer
    export_adapter(adapter, to="gguf", output=tmp_path / "out", base=base)
    reader = gguf.GGUFReader(tmp_path / "out" / "adapter.gguf")
    assert reader.fields["adapter.lora.alpha"].contents() == 12.0
    assert {len(tensor.data) for tensor in reader.tensors if tensor.name.endswith("lora_a")} == {12}
    (name,) = [n for n in read_folder(adapter).tensors if "layers.0.mlp.down_proj.lora_B" in n]
    (held,) = [t.data for t in reader.tensors if t.name == "blk.0.ffn_down.weight.lora_b"]
    torch.testing.assert_close(torch.from_numpy(np.array(held)), read_folder(adapter).tensors[name] * 16 / 12**0.5)


def test_half_precision_holds_the_rounded_values(saved, tmp_path):
    base, adapter = saved("llava")
    done = export_adapter(adapter, to="gguf", output=tmp_path / "out", base=base, dtype="float16")
    tensors = gguf.GGUFReader(tmp_path / "out" / "adapter.gguf").tensors
    assert {tensor.data.dtype for tensor in tensors} == {np.dtype(np.float16)}
    of_tensors, of_updates, of_outputs = done.record["comparisons"]
    assert of_tensors["largest_difference"] == 0.0 < of_updates["largest_difference"] < 2e-3
    assert of_outputs["verdict"] == "passed" and of_outputs["effect"] > 100 * of_outputs["largest_difference"]


def test_the_content_of_the_file_and_the_card(saved, tmp_path):
    base, adapter = saved("llava")
    done = export_adapter(adapter, to="gguf", output=tmp_path / "out", base=base)
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == ["README.md", "adapter.gguf", "export.json"]
    fields = gguf.GGUFReader(tmp_path / "out" / "adapter.gguf").fields
    assert fields["general.name"].contents() == "testing/cell"
    assert "the vision tower and the projector are not in it" in fields["general.description"].contents()
    assert fields["finetune.manifest"].contents() == f"sha256:{done.record['manifest']}"
    card = (tmp_path / "out" / "README.md").read_text()
    assert "```bash\n# base.gguf" in card and "--mmproj mmproj.gguf --lora adapter.gguf" in card
    assert "nothing of the vision tower and the projector" in card and "llama.cpp itself did not run" in card


def test_a_base_whose_images_llama_cpp_cannot_see(saved, tmp_path):
    base, adapter = saved("fast_vlm")
    export_adapter(adapter, to="gguf", output=tmp_path / "out", base=base)
    card = (tmp_path / "out" / "README.md").read_text()
    assert "--mmproj" not in card and "not known here to see images as a fast_vlm base does" in card


@pytest.mark.parametrize(
    ("family", "kind", "message"),
    [
        (
            "llava",
            "patterns",
            r"it also changes projector \(model.multi_modal_projector.linear_1\), and llama.cpp adapts",
        ),
        ("llava", "dora", "it is a DoRA, and llama.cpp's LoRA has no magnitudes. .* --to merged"),
        (
            "llava",
            "prompt",
            r"its tuned prompt stands before the tokens .*, and llama.cpp takes only LoRA. Load it with finetune.load",
        ),
        (
            "llava",
            "full_modules",
            r"it holds full_modules \(whole parameters\), and llama.cpp takes only LoRA. .* --to merged",
        ),
        (
            "paligemma",
            "lora",
            "a paligemma base cannot be written as GGUF: .* no bidirectional attention over the prompt",
        ),
        (
            "clip",
            "lora",
            r"the architecture of its base must be generative, got dual_encoder \(clip\). Export it with --to onnx",
        ),
    ],
)
def test_what_llama_cpp_cannot_hold_is_refused_before_the_base_is_loaded(saved, tmp_path, family, kind, message):
    _, adapter = saved(family, kind)
    with pytest.raises(ExportError, match=message):
        export_adapter(adapter, to="gguf", output=tmp_path / "out", base="/nowhere")
    assert not list(tmp_path.glob("*out*"))


def test_an_unknown_dtype_is_refused(saved, tmp_path):
    _, adapter = saved("llava")
    with pytest.raises(ExportError, match="dtype must be one of float32, float16, got 'bfloat16'"):
        export_adapter(adapter, to="gguf", output=tmp_path / "out", base="/nowhere", dtype="bfloat16")


def test_without_the_package_the_error_names_the_extra(saved, tmp_path, monkeypatch):
    _, adapter = saved("llava")
    monkeypatch.setattr(extras, "find_spec", lambda name: None)
    with pytest.raises(MissingExtraError, match=r"needs gguf, .* pip install 'finetune-vlm\[gguf\]'"):
        export_adapter(adapter, to="gguf", output=tmp_path / "out", base="/nowhere")


def one_bit(held):
    name = min(held.pairs)
    held.pairs[name][1].view(torch.int32)[0, 0] ^= 1
    return held


def another_alpha(held):
    return LoraFile(architecture=held.architecture, alpha=2 * held.alpha, pairs=held.pairs)


def one_pair_less(held):
    return LoraFile(
        architecture=held.architecture, alpha=held.alpha, pairs={n: held.pairs[n] for n in sorted(held.pairs)[1:]}
    )


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (one_bit, "so no files were kept. failed: the 28 tensors of adapter.gguf"),
        (another_alpha, r"adapter.gguf must hold llama, alpha \d+\.0 and .* got llama, alpha"),
        (one_pair_less, "adapter.gguf must hold llama, .* 14 weights, got llama, .* 13"),
    ],
)
def test_a_file_that_is_not_what_was_written_is_found(saved, tmp_path, monkeypatch, damage, message):
    base, adapter = saved("llava")
    read = target.read_lora
    monkeypatch.setattr(target, "read_lora", lambda path: damage(read(path)))
    with pytest.raises(ExportError, match=message):
        export_adapter(adapter, to="gguf", output=tmp_path / "out", base=base)
    assert not list(tmp_path.glob("*out*"))


def test_scaling_left_out_and_rows_in_another_order_are_found(saved, tmp_path, monkeypatch):
    base, adapter = saved("llava")
    for name, broken in (
        ("bake_scaling", lambda tensors, config: (dict(tensors), {**config, "lora_alpha": config["r"]})),
        ("LoraUpdate", lambda module, down, up, scaling: LoraUpdate(module, down, up.flip(0), scaling)),
    ):
        with monkeypatch.context() as patch, pytest.raises(ExportError, match="failed: alpha / r") as error:
            patch.setattr(target, name, broken)
            export_adapter(adapter, to="gguf", output=tmp_path / "out", base=base)
        assert "failed: the base with what adapter.gguf holds, with the adapter" in str(error.value)
