"""A whole model with the adapter in its weights: equal outputs by transformers alone, or nothing at all."""

import gc
import json
import shutil
import weakref
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForImageTextToText, AutoProcessor

from finetune.adapters.base_identity import identify_processor
from finetune.assemble.loading import load_base
from finetune.errors import ExportError
from finetune.export.exporting import export_adapter
from finetune.export.merged import own_dtype, untie
from finetune.export.parity import outputs, rows_of
from finetune.methods.adapter import merge
from finetune.methods.lora_update import LoraUpdate
from finetune.serving.loading import load
from tests.tiny import FAMILIES

CELLS = [
    ("llava", "patterns"),
    ("fast_vlm", "dora"),
    ("paligemma", "full_modules"),
    ("gemma3", "lora"),
    ("qwen2_5_vl", "lora"),
    ("clip", "lora"),
    *(
        pytest.param(family, kind, marks=pytest.mark.slow)
        for family in sorted(FAMILIES)
        for kind in ("lora", "dora", "full_modules")
        if (family, kind) != ("clip", "full_modules")
    ),
]


@pytest.mark.parametrize(("family", "kind"), CELLS)
def test_transformers_alone_gives_the_adapters_outputs(saved, tmp_path, family, kind):
    base, adapter = saved(family, kind)
    done = export_adapter(adapter, to="merged", output=tmp_path / "out", base=base)
    assert done.verdict == "passed" and done.record["options"] == {"dtype": "auto", "max_shard_size": "5GB"}
    live = load(adapter, base=base, device="cpu")
    rows = rows_of(live.base, live.adapter.manifest.probe)
    wanted = outputs(live.base, rows)
    model = live.base.family.auto_class.from_pretrained(tmp_path / "out").eval()
    assert type(model) is type(live.model) and model.dtype == torch.float32
    with torch.no_grad():
        for name, row in rows.items():
            got = live.base.family.outputs(model, row.inputs)[0]
            assert (got - wanted[name]).abs().max() < 1e-5 * wanted[name].abs().max()
    keys = [sorted(load_file(folder / "model.safetensors")) for folder in (tmp_path / "out", Path(base))]
    assert keys[0] == keys[1], "the base's own layout"
    template = str(live.processor.chat_template or "")
    AutoProcessor.from_pretrained(tmp_path / "out")
    assert identify_processor(str(tmp_path / "out"), chat_template=template) == live.base.digests


def test_half_precision_and_shards(saved, tmp_path):
    base, adapter = saved("llava", "lora")
    done = export_adapter(
        adapter, to="merged", output=tmp_path / "out", base=base, dtype="bfloat16", max_shard_size="100KB"
    )
    assert done.verdict == "passed"
    assert [c["verdict"] for c in done.record["comparisons"]] == ["passed"] * 3
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    assert len(set(index["weight_map"].values())) > 2
    model = AutoModelForImageTextToText.from_pretrained(tmp_path / "out")
    assert model.dtype == torch.bfloat16
    merged, plain = model.state_dict(), AutoModelForImageTextToText.from_pretrained(base).state_dict()
    same = [name for name in plain if torch.equal(merged[name], plain[name].bfloat16())]
    assert len(same) == len(plain) - 14, "the rest is the base's own"
    card = (tmp_path / "out" / "README.md").read_text()
    assert "\nlicense" not in card and "Licence of the adapter, beside that of the base: not stated" in card
    assert "base_model_relation: finetune" in card and "A whole model: a local base (`llava`) with an adapter" in card


@pytest.mark.parametrize(("stated", "dtype"), [("bfloat16", torch.bfloat16), (None, torch.float16)])
def test_the_dtype_is_that_in_which_a_reader_gets_the_base(saved, tmp_path, stated, dtype):
    base, _ = saved("llava")
    shutil.copytree(base, tmp_path / "half")
    weights = {name: tensor.half() for name, tensor in load_file(tmp_path / "half" / "model.safetensors").items()}
    save_file(weights, tmp_path / "half" / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((tmp_path / "half" / "config.json").read_text())
    for part in (config, config["text_config"], config["vision_config"]):
        part["dtype"] = stated
    (tmp_path / "half" / "config.json").write_text(json.dumps(config))
    assert AutoModelForImageTextToText.from_pretrained(tmp_path / "half").dtype == dtype
    from tests.serving.adapters import make_adapter

    adapter = make_adapter(load_base(str(tmp_path / "half"), device="cpu"), "lora", tmp_path / "adapter")
    export_adapter(adapter, to="merged", output=tmp_path / "out", base=str(tmp_path / "half"))
    assert {t.dtype for t in load_file(tmp_path / "out" / "model.safetensors").values()} == {dtype}
    assert AutoModelForImageTextToText.from_pretrained(tmp_path / "out").dtype == dtype


def test_an_adapter_of_a_quantized_base_goes_into_the_unquantized_one(saved, tmp_path):
    from tests.matrix import LORA, train_cell

    base, _ = saved("llava")
    cell = train_cell(base, LORA, tmp_path / "run", quantization="8bit")
    done = export_adapter(f"{cell['folder']}/adapter", to="merged", output=tmp_path / "out", base=base)
    assert done.verdict == "passed"
    assert "quantization_config" not in json.loads((tmp_path / "out" / "config.json").read_text())
    done = export_adapter(
        f"{cell['folder']}/adapter", to="peft", output=tmp_path / "peft", base=base, quantization="8bit"
    )
    assert done.verdict == "passed", "on the base as it was in training"
    with pytest.raises(
        ExportError, match="needs --to peft or vllm, which write no weights of the base, got --to merged"
    ):
        export_adapter(f"{cell['folder']}/adapter", to="merged", output=tmp_path / "no", quantization="8bit")


@pytest.mark.parametrize("kind", ["prompt", "everything"])
def test_a_prompt_is_refused_before_the_base_is_loaded(saved, tmp_path, kind):
    _, adapter = saved("llava", kind)
    with pytest.raises(ExportError, match="cannot be merged: its tuned prompt stands before the tokens of each row"):
        export_adapter(adapter, to="merged", output=tmp_path / "out", base="/nowhere")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"dtype": "bfloat61"},
            "dtype must be one of auto, float32, .*, got 'bfloat61'. Did you mean 'bfloat16'\\?",
        ),
        ({"max_shard_size": "5 gigs"}, "max_shard_size must be a size such as 5GB or 500MB, got '5 gigs'"),
    ],
)
def test_a_wrong_option_is_refused_first(options, message):
    with pytest.raises(ExportError, match=message):
        export_adapter("no/body", to="merged", **options)


def test_a_merge_that_changes_nothing_is_an_error(saved, tmp_path, monkeypatch):
    base, adapter = saved()
    monkeypatch.setattr("finetune.export.merged.merge", lambda updates: None)
    with pytest.raises(ExportError, match="changes no weight of its base in float32, so the merged"):
        export_adapter(adapter, to="merged", output=tmp_path / "out", base=base)
    assert not list(tmp_path.glob("*out*"))


def test_a_merge_that_goes_wrong_is_found_before_anything_is_written(saved, tmp_path, monkeypatch):
    base, adapter = saved()

    def halfway(updates):
        merge(dict(list(updates.items())[::2]))

    monkeypatch.setattr("finetune.export.merged.merge", halfway)
    monkeypatch.setattr("finetune.export.merged.Merged._write", lambda *args: pytest.fail("written"))
    with pytest.raises(ExportError, match="failed: outputs of the model merged in float32"):
        export_adapter(adapter, to="merged", output=tmp_path / "out", base=base)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_one_copy_at_a_time(saved, tmp_path, monkeypatch, dtype):
    base, adapter = saved()
    weights = []

    def watch(updates):
        weights.extend(weakref.ref(update.module.weight) for update in updates.values())
        merge(updates)

    def load(path, **options):
        gc.collect()
        assert weights and not any(weight() is not None for weight in weights), "the merged model is still held"
        return load_base(path, **options)

    monkeypatch.setattr("finetune.export.merged.merge", watch)
    monkeypatch.setattr("finetune.export.merged.load_base", load)
    export_adapter(adapter, to="merged", output=tmp_path / "out", base=base, dtype=dtype)


def test_a_class_that_cannot_be_saved_is_an_error_of_ours(saved, tmp_path, monkeypatch):
    base, adapter = saved()

    def fail(*args, **options):
        raise RuntimeError("The weights trying to be saved contained shared tensors\nand more")

    monkeypatch.setattr("transformers.PreTrainedModel.save_pretrained", fail)
    with pytest.raises(ExportError, match="transformers cannot save this LlavaFor.*: The weights trying .* tensors$"):
        export_adapter(adapter, to="merged", output=tmp_path / "out", base=base)


def flip_a_bit(folder):
    weights = folder / "model.safetensors"
    data = bytearray(weights.read_bytes())
    data[-4] ^= 1  # the last bit of the last value
    weights.write_bytes(data)


def other_template(folder):
    (folder / "chat_template.jinja").write_text("{{ messages }}")


def no_tokenizer(folder):
    (folder / "tokenizer_config.json").unlink()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (flip_a_bit, "failed: the 80 weights that transformers loads with those merged, .*; 1 differ, such as"),
        (other_template, "trained with another chat template"),
        (no_tokenizer, "tokenizer"),
    ],
    ids=["flipped bit", "other template", "no tokenizer"],
)
def test_what_changes_on_the_way_to_the_disk_is_found(saved, tmp_path, monkeypatch, change, message):
    base, adapter = saved()
    real = load_base

    def load_changed(path, **options):
        if ".out.exporting" in path:
            change(tmp_path / ".out.exporting" / "new")
        return real(path, **options)

    monkeypatch.setattr("finetune.export.merged.load_base", load_changed)
    with pytest.raises(Exception, match=message):
        export_adapter(adapter, to="merged", output=tmp_path / "out", base=base)
    assert not list(tmp_path.glob("*out*"))


def test_a_full_disk_is_reported_before_the_merge(saved, tmp_path, monkeypatch):
    base, adapter = saved()
    monkeypatch.setattr("shutil.disk_usage", lambda path: shutil._ntuple_diskusage(10, 9, 1))
    monkeypatch.setattr("finetune.export.merged.merge", lambda updates: pytest.fail("merged"))
    with pytest.raises(ExportError, match=r"The export needs 0.5 MB, and the disk has 0.0 MB free.*\(--output\)"):
        export_adapter(adapter, to="merged", output=tmp_path / "out", base=base)
    assert not list(tmp_path.glob("*out*"))


def test_weights_too_large_for_float16_are_named(saved, tmp_path):
    base, adapter = saved("llava")
    import finetune.export.merged as merged

    model = load_base(base, device="cpu").model
    with torch.no_grad():
        model.lm_head.weight[0, 0] = 1e5
    with pytest.raises(
        ExportError, match="lm_head.weight: every value must be finite in torch.float16, and some are not. Choose"
    ):
        merged._digests(model, "float16")


@pytest.mark.parametrize("family", ["gemma3", "paligemma"])
def test_a_tied_weight_that_is_changed_becomes_one_of_its_own(saved, tmp_path, family):
    base, _ = saved(family)
    model = load_base(base, device="cpu").model
    assert model.lm_head.weight is model.get_input_embeddings().weight
    before = model.lm_head.weight.clone()
    down, up = torch.ones(1, model.lm_head.in_features), torch.ones(model.lm_head.out_features, 1)
    updates = {"lm_head": LoraUpdate(model.lm_head, down, up, 0.5)}
    untie(model, updates)
    merge(updates)
    model.save_pretrained(tmp_path)
    loaded = AutoModelForImageTextToText.from_pretrained(tmp_path)
    assert torch.equal(loaded.get_input_embeddings().weight, before)
    assert torch.equal(loaded.lm_head.weight, before + 0.5)
    assert '"tie_word_embeddings": true' not in (tmp_path / "config.json").read_text(), "other loaders go by it"


def test_tied_weights_that_stay_are_still_tied(saved, tmp_path):
    base, adapter = saved("gemma3")
    export_adapter(adapter, to="merged", output=tmp_path / "out", base=base)
    model = AutoModelForImageTextToText.from_pretrained(tmp_path / "out")
    assert model.lm_head.weight is model.get_input_embeddings().weight


def test_the_dtype_is_that_of_all_files_of_a_base_whose_config_states_none(tmp_path):
    names = {"a": "model-00001-of-00002.safetensors", "b": "model-00002-of-00002.safetensors"}
    save_file({"a": torch.zeros(3)}, tmp_path / names["a"])
    save_file({"b": torch.zeros(5, dtype=torch.bfloat16)}, tmp_path / names["b"])
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": names}))
    (tmp_path / "config.json").write_text('{"model_type": "clip"}')
    assert own_dtype(tmp_path) == "bfloat16"
    (tmp_path / "config.json").write_text('{"model_type": "clip", "dtype": "float16"}')
    assert own_dtype(tmp_path) == "float16"
