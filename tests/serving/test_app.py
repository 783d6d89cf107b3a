"""From a trained adapter to an app: everything is checked, and a refusal leaves base and neighbours untouched."""

import json
import shutil

import pytest
import torch

from finetune.adapters.base_identity import identify_base
from finetune.adapters.folder import config_bytes, file_entries, read_folder, weights_bytes
from finetune.adapters.manifest import CONFIG_NAME, MANIFEST_NAME, WEIGHTS_NAME, AdapterManifest
from finetune.errors import (
    AdapterError,
    BaseMismatchError,
    IntegrityError,
    ManifestError,
    NotFoundError,
    ProbeError,
    YankedError,
)
from finetune.evaluation.compare import evaluate, table
from finetune.registry import AdapterRegistry
from finetune.runs.train import train
from finetune.serving.known_bases import find_base
from finetune.serving.loading import load


@pytest.fixture(scope="module", params=["idefics3", "fast_vlm"])
def trained(request, tmp_path_factory):
    """A tiny base with two published adapters: the folder of the base, their registry, and one adapter's folder."""
    from tests.tiny import FAMILIES

    return request.param, FAMILIES[request.param](tmp_path_factory.mktemp("base") / request.param)


@pytest.fixture
def published(trained, make_recipe):
    _, base = trained
    first = train(make_recipe(base, train={"max_steps": 4}, method={"lora_dropout": 0.1}))
    second = train(make_recipe(base, name="others", seed=7, adapter={"publish": "testing/others"}))
    return base, first, second


def image():
    import numpy as np

    return np.full((32, 32, 3), (200, 20, 20), np.uint8)


def state(model):
    return {name: tensor.clone() for name, tensor in (*model.named_parameters(), *model.named_buffers())}


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def test_train_publish_load_ask_swap(published, rows_folder):
    base, first, second = published
    assert (first.ref, second.ref) == ("testing/squares@1", "testing/others@1")
    assert first.metrics["test"].n == 4 and first.metrics["base"].n == 4
    vlm = load("testing/squares@latest", base=str(base), device="cpu")
    assert type(vlm.model).__name__ in ("Idefics3ForConditionalGeneration", "FastVlmForConditionalGeneration")
    with vlm.using(None):
        plain = vlm.base.probe(0)
    mine = vlm.base.probe(0)
    with vlm.using("testing/others"):
        other = vlm.base.probe(0)
        assert vlm.adapter.ref == "testing/others"
    assert torch.equal(vlm.base.probe(0), mine), "swapping back gives the same bits"
    assert not torch.equal(plain, mine) and not torch.equal(mine, other)
    assert isinstance(vlm.ask(image(), "What color is it?"), str)
    fresh = load("base", base=str(base), device="cpu")
    assert torch.equal(fresh.base.probe(0), plain), "with the adapter off the base is the base"


def test_the_base_is_found_again_where_it_was_last_used(published):
    base, first, _ = published
    assert load(first.ref, device="cpu").adapter.manifest.full_name == "testing/squares"
    assert load(first.adapter, device="cpu").adapter.probe.verdict == "passed"


def test_a_load_resolves_and_reads_a_version_once(published, monkeypatch):
    asked = []
    for name in ("resolve", "read"):
        whole = getattr(AdapterRegistry, name)
        monkeypatch.setattr(AdapterRegistry, name, lambda self, ref, w=whole, n=name: asked.append(n) or w(self, ref))
    vlm = load("testing/squares@latest", device="cpu", alias_seconds=3600)
    assert sorted(asked) == ["read", "resolve"]
    loaded = vlm.adapter
    with vlm.using(None), vlm.using("testing/squares@latest"):
        assert vlm.adapter is loaded
    assert sorted(asked) == ["read", "resolve"], "the alias is known for some seconds"


def test_evaluate_makes_one_row_an_adapter_and_config(published, make_recipe):
    base, first, second = published
    rows = evaluate(["base", first.ref, second.ref], [make_recipe(base)])
    assert [row.adapter for row in rows] == ["base", "testing/squares@1", "testing/others@1"]
    assert {row.config for row in rows} == {"squares"} and all(row.scores.n == len(row.rows) == 4 for row in rows)
    assert rows[0].scores == first.metrics["base"], "the base is what it was in the run"
    assert rows[1].scores.first.value == pytest.approx(first.metrics["test"].first.value)
    lines = [json.loads(line) for line in (first.folder / "predictions-adapter.jsonl").read_text().splitlines()]
    assert lines == [row.to_json() for row in rows[1].rows]
    head = [cell.strip() for cell in table(rows).splitlines()[0].split("  ") if cell]
    assert head == ["adapter", "config", "exact match", "95 % interval", "majority", "blank image", "rows"]


def test_what_a_run_leaves(published):
    _, first, _ = published
    names = {path.name for path in first.folder.iterdir()}
    assert {"recipe.json", "log.jsonl", "adapter", "last", "best", "predictions-adapter.jsonl"} <= names
    manifest = AdapterManifest.parse((first.adapter / MANIFEST_NAME).read_bytes())
    assert manifest.training.rows == {"train": 18, "val": 4, "test": 4}
    assert manifest.metrics["test"]["n"] == 4 and manifest.metrics.keys() == {"test", "base"}
    assert str(first.folder) not in manifest.to_bytes().decode(), "no local path"


# Each of these changes a copy of a good adapter, and re-signs it with right digests unless that is the point.


def resave(folder, tensors, config, manifest, **changes):
    weights, text = weights_bytes(tensors), config_bytes(config)
    data = manifest.model_dump() | {"files": {n: e.model_dump() for n, e in file_entries(weights, text).items()}}
    for path, value in changes.items():
        place = data
        *parents, last = path.split("__")
        for part in parents:
            place = place[int(part) if part.isdigit() else part]
        place[last] = value
    (folder / WEIGHTS_NAME).write_bytes(weights)
    (folder / CONFIG_NAME).write_bytes(text)
    (folder / MANIFEST_NAME).write_bytes(AdapterManifest.model_validate(data).to_bytes())


def zero_b(folder, tensors, config, manifest):
    tensors = {n: torch.zeros_like(t) if "lora_B" in n else t for n, t in tensors.items()}
    resave(folder, tensors, config, manifest)


def double_alpha(folder, tensors, config, manifest):
    options = manifest.adapter.parts[0].options | {"lora_alpha": manifest.adapter.parts[0].options["lora_alpha"] * 2}
    resave(folder, tensors, config | options, manifest, adapter__parts__0__options=options)


def alpha_in_config_only(folder, tensors, config, manifest):
    resave(folder, tensors, config | {"lora_alpha": 99.0}, manifest)


def rename_in_file(folder, tensors, config, manifest):
    resave(folder, {n.replace("q_proj", "k_prroj"): t for n, t in tensors.items()}, config, manifest)


def rename_everywhere(folder, tensors, config, manifest):
    renamed = {n.replace("lora_A", "lora_Z"): t for n, t in tensors.items()}
    table = {n.replace("lora_A", "lora_Z"): e.model_dump() for n, e in manifest.adapter.tensors.items()}
    resave(folder, renamed, config, manifest, adapter__tensors=table)


def other_rank(folder, tensors, config, manifest):
    options = manifest.adapter.parts[0].options | {"r": 2}
    resave(folder, tensors, config | options, manifest, adapter__parts__0__options=options)


def huge_rank(folder, tensors, config, manifest):
    options = manifest.adapter.parts[0].options | {"r": 2_000_000}
    resave(folder, tensors, config | options, manifest, adapter__parts__0__options=options)


def unknown_module(folder, tensors, config, manifest):
    modules = dict(manifest.adapter.parts[0].modules) | {"projector": ["model.nowhere"]}
    names = [name for names in modules.values() for name in names]
    resave(folder, tensors, config | {"target_modules": names}, manifest, adapter__parts__0__modules=modules)


def not_finite(folder, tensors, config, manifest):
    name = next(iter(tensors))
    tensors = tensors | {name: torch.full_like(tensors[name], float("nan"))}
    resave(folder, tensors, config, manifest)


def flip_a_byte(folder, tensors, config, manifest):
    data = bytearray((folder / WEIGHTS_NAME).read_bytes())
    data[-3] ^= 1
    (folder / WEIGHTS_NAME).write_bytes(data)


def drop_half(folder, tensors, config, manifest):
    resave(folder, dict(list(tensors.items())[: len(tensors) // 2]), config, manifest)


def modules_to_save(folder, tensors, config, manifest):
    resave(folder, tensors, config | {"modules_to_save": ["lm_head"]}, manifest)


def auto_mapping(folder, tensors, config, manifest):
    resave(folder, tensors, config | {"auto_mapping": {"base_model_class": "x"}}, manifest)


def options_with(**more):
    def change(folder, tensors, config, manifest):
        options = manifest.adapter.parts[0].options | more
        resave(folder, tensors, config | options, manifest, adapter__parts__0__options=options)

    change.__name__ = "options_" + "_".join(more)
    return change


def huge_values(folder, tensors, config, manifest):
    resave(folder, {n: torch.full_like(t, 1e38) for n, t in tensors.items()}, config, manifest)


def other_generation(folder, tensors, config, manifest):
    resave(folder, tensors, config, manifest, processor__generation_config="0" * 64)


def other_tokenizer(folder, tensors, config, manifest):
    resave(folder, tensors, config, manifest, processor__tokenizer="0" * 64)


def an_unknown_method(folder, tensors, config, manifest):
    resave(folder, tensors, config, manifest, adapter__parts__0__method="os.system")


def another_peft_type(folder, tensors, config, manifest):
    changed = config | {"peft_type": "PROMPT_TUNING"}
    resave(folder, tensors, changed, manifest, adapter__peft_type="PROMPT_TUNING")


REFUSALS = [
    (another_peft_type, ManifestError, "peft_type must be 'LORA' for lora on .*, got 'PROMPT_TUNING'"),
    (zero_b, ProbeError, "its effect on the probe is 0, the recorded effect is"),
    (double_alpha, ProbeError, "must have the effect that it had when it was saved"),
    (alpha_in_config_only, ManifestError, "lora_alpha must be 8.*, got 99.0"),
    (
        rename_in_file,
        ManifestError,
        "tensors of the manifest: 4 are missing .*q_proj.* are not in the manifest .*k_prroj",
    ),
    (rename_everywhere, ManifestError, "tensors must be those of its modules on this base: .*lora_A.*lora_Z"),
    (other_rank, ManifestError, "must have the shape .* on this base, got"),
    (huge_rank, AdapterError, "r must be a whole number from 1 to 4096, got 2000000"),
    (unknown_module, AdapterError, "this base has no module 'model.nowhere'"),
    (not_finite, IntegrityError, "the values of tensor .* must be finite, got NaN or infinity"),
    (flip_a_byte, IntegrityError, "must be the file that the manifest lists"),
    (drop_half, ManifestError, "tensors of the manifest: .* are missing"),
    (modules_to_save, ManifestError, "modules_to_save"),
    (auto_mapping, ManifestError, "must not have the fields auto_mapping"),
    (options_with(bias="all"), ManifestError, "missing or unknown: bias"),
    (options_with(target_modules=".*"), ManifestError, "target_modules"),
    (options_with(init_lora_weights="pissa"), ManifestError, "missing or unknown: init_lora_weights"),
    (options_with(layer_replication=[[0, 2]]), ManifestError, "missing or unknown: layer_replication"),
    (options_with(lora_alpha="8"), ManifestError, "lora_alpha must be a number above 0 and below 1e6, got '8'"),
    (options_with(lora_alpha=1e38), ManifestError, "lora_alpha must be a number above 0 and below 1e6, got 1e.38"),
    (options_with(rank_pattern={"(a+)+$": 4}), ManifestError, "rank_pattern must map names of the adapter's modules"),
    (options_with(r=True), AdapterError, "r must be a whole number from 1 to 4096, got True"),
    (huge_values, ProbeError, "must have the effect that it had"),
    (other_generation, BaseMismatchError, "trained with another generation config"),
    (other_tokenizer, BaseMismatchError, "trained with another tokenizer"),
    (an_unknown_method, AdapterError, "peft_type must be .* for os.system on .*, got 'LORA'"),
]


def test_each_damage_is_refused_by_name_and_leaves_everything_as_it_was(published, tmp_path):
    base, first, second = published
    vlm = load(second.ref, base=str(base), device="cpu")
    before, neighbour = state(vlm.model), vlm.base.probe(0)
    modules = [name for name, _ in vlm.model.named_modules()]
    good = read_folder(first.adapter)
    config = json.loads((first.adapter / CONFIG_NAME).read_bytes())
    for number, (change, error, message) in enumerate(REFUSALS):
        folder = tmp_path / f"{number}"
        shutil.copytree(first.adapter, folder)
        change(folder, dict(good.tensors), dict(config), good.manifest)
        with pytest.raises(error, match=message):
            vlm.add(folder)
        assert same(before, state(vlm.model)), change.__name__
        assert [name for name, _ in vlm.model.named_modules()] == modules, f"{change.__name__} left a ghost"
        assert torch.equal(vlm.base.probe(0), neighbour), change.__name__
        assert vlm.adapter.ref == second.ref
    vlm.add(first.adapter)  # and the good one still loads
    assert torch.equal(vlm.base.probe(0), neighbour)


def test_another_base_of_equal_shapes_is_refused(published, trained, tmp_path):
    from tests.tiny import FAMILIES

    family, _ = trained
    base, first, _ = published
    twin = FAMILIES[family](tmp_path / "twin", seed=1)
    with pytest.raises(BaseMismatchError, match="trained on another base: model.safetensors has sha256"):
        load(first.ref, base=str(twin), device="cpu")
    config = json.loads((base / "config.json").read_text())
    shutil.copytree(base, tmp_path / "tweaked")
    config["text_config"]["rms_norm_eps"] = 1e-3
    (tmp_path / "tweaked" / "config.json").write_text(json.dumps(config))
    with pytest.raises(BaseMismatchError, match="its config.json differs"):
        load(first.ref, base=str(tmp_path / "tweaked"), device="cpu")


def test_a_name_that_was_never_published(published):
    base, *_ = published
    with pytest.raises(NotFoundError, match="squares"):
        load("testing/sqares", base=str(base), device="cpu")
    with pytest.raises(BaseMismatchError, match="got none. Name it with base="):
        load("base")


def test_an_unknown_base_is_asked_for(published, tmp_path, monkeypatch):
    _, first, _ = published
    monkeypatch.setenv("FINETUNE_CACHE", str(tmp_path / "elsewhere"))
    with pytest.raises(BaseMismatchError, match="this machine knows no folder of it. Give its folder: base=PATH"):
        load(first.ref, registry=AdapterRegistry(), device="cpu")


def test_a_base_that_an_earlier_version_noted_is_found(published, tmp_path, monkeypatch):
    base, first, _ = published
    monkeypatch.setenv("FINETUNE_CACHE", str(tmp_path / "elsewhere"))
    identity = identify_base(str(base))
    note = tmp_path / "elsewhere" / "bases" / f"{identity.digest}.json"
    note.parent.mkdir(parents=True)
    note.write_text(json.dumps({"path": str(base)}))
    assert find_base(identity) == str(base)
    for damaged in ("", "[]", '{"path": 3}', '{"path": "\\u0000"}'):
        note.write_text(damaged)
        with pytest.raises(BaseMismatchError, match="this machine knows no folder of it"):
            find_base(identity)


def test_a_base_in_half_precision_gives_an_adapter_that_loads_in_full(trained, make_recipe):
    _, base = trained
    run = train(make_recipe(base, model={"dtype": "bfloat16"}, name="half"))
    vlm = load(run.adapter, base=str(base), device="cpu")
    assert vlm.model.dtype == torch.float32 and vlm.adapter.probe.verdict == "passed"
    assert load(run.adapter, base=str(base), device="cpu", dtype="bfloat16").adapter.probe.verdict == "passed"
    assert {entry.dtype for entry in vlm.adapter.manifest.adapter.tensors.values()} == {"F32"}


def test_an_alias_that_moves_is_followed(published):
    base, first, second = published
    registry = AdapterRegistry()
    registry.alias("testing/squares", "prod", 1)
    vlm = load("testing/squares@prod", base=str(base), device="cpu")
    before = vlm.base.probe(0)
    registry.publish(first.adapter)
    registry.alias("testing/squares", "prod", 2)
    vlm.use("testing/squares@prod")
    assert torch.equal(vlm.base.probe(0), before), "the same bytes are the same loaded"
    with pytest.raises(NotFoundError):
        vlm.use("testing/squares@staging")
    assert vlm.adapter is not None


def test_a_yanked_version_warns_when_it_is_named_and_answers_to_no_alias(published):
    base, first, second = published
    registry = AdapterRegistry()
    registry.alias("testing/squares", "prod", 1)
    registry.yank("testing/squares@1", reason="wrong rows")
    vlm = load(second.ref, base=str(base), device="cpu")
    with pytest.raises(YankedError, match="@prod points to version 1, which is yanked: wrong rows"):
        vlm.use("testing/squares@prod")
    assert vlm.adapter.ref == second.ref
    with pytest.warns(UserWarning, match="squares@1 is yanked: wrong rows. Use another version"):
        vlm.use("testing/squares@1")
    assert vlm.adapter.ref == "testing/squares@1"


def test_a_base_folder_that_holds_an_adapter_is_refused(trained, tmp_path):
    from finetune.errors import ModelError

    _, base = trained
    shutil.copytree(base, tmp_path / "base")
    (tmp_path / "base" / "adapter_config.json").write_text("{}")
    with pytest.raises(ModelError, match="must not hold an adapter_config.json"):
        load("base", base=str(tmp_path / "base"), device="cpu")
    (tmp_path / "base" / "adapter_config.json").unlink()
    (tmp_path / "base" / "model.safetensors").rename(tmp_path / "base" / "pytorch_model.bin")
    with pytest.raises(ModelError, match="must hold safetensors weights"):
        load("base", base=str(tmp_path / "base"), device="cpu")


def test_peft_opens_the_folder_too(published, tmp_path):
    """The one that a run leaves, and the one that a mirror on the hub holds."""
    from peft import PeftModel

    from finetune.assemble.loading import load_base
    from finetune.registry import AdapterRegistry
    from finetune.registry.transfer.hub import write_hub_folder

    base, first, _ = published
    vlm = load(first.ref, base=str(base), device="cpu")
    wanted = vlm.base.probe(0)
    registry = AdapterRegistry()
    mirrored = write_hub_folder(registry, registry.resolve(first.ref), tmp_path / "hub")
    for folder in (first.adapter, mirrored):
        plain = load_base(str(base), device="cpu")
        PeftModel.from_pretrained(plain.model, folder)
        assert torch.allclose(plain.probe(0), wanted, atol=1e-6)
    loaded = load(mirrored, base=str(base), device="cpu")
    assert torch.equal(loaded.base.probe(0), wanted)


def test_an_adapter_that_breaks_while_it_is_attached_leaves_the_active_one_answering(published, monkeypatch):
    """As running out of memory does."""
    base, first, second = published
    vlm = load(first.adapter, base=str(base), device="cpu")
    before, active = vlm.base.probe(0), vlm.adapter

    def fail(*args, **options):
        raise torch.OutOfMemoryError("no memory left")

    monkeypatch.setattr("finetune.methods.lora.LoraUpdate", fail)
    with pytest.raises(torch.OutOfMemoryError):
        vlm.add(second.adapter)
    assert vlm.adapter is active and vlm.switcher.loaded_adapters == (active,)
    assert torch.equal(vlm.base.probe(0), before)
