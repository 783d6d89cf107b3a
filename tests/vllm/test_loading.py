"""vLLM's own LoRA manager, on its own class of every family, beside what the target ``vllm`` writes and refuses."""

import json

import pytest

from finetune.adapters.folder import read_folder
from finetune.assemble.loading import load_base
from finetune.errors import ExportError
from finetune.export.exporting import export_adapter
from finetune.export.vllm_rules import LAYERS, WITHOUT_LORA, refuse_for_vllm
from finetune.methods.adapter import updates
from tests.serving.adapters import KINDS, LORA, make_adapter
from tests.tiny import FAMILIES

pytestmark = pytest.mark.vllm
SERVED = {
    "lora": LORA,
    "wide lora": KINDS["wide lora"],
    "rank 7": {**LORA, "towers": {"language": {"target_modules": ["q_proj", "up_proj"], "r": 7}}},
}
# What we refuse: kind of adapter -> what vLLM says of it, None where it takes it and serves only a part.
REFUSED = {
    "dora": "vLLM does not yet support DoRA",
    "vision": None,
    "patterns": None,
    "prompt": "Missing required configuration fields",
    "full_modules": "Missing required configuration fields",
}
# What no manifest can say: changes of the config -> what vLLM says of it.
INCOMPATIBLE = {
    "bias": ({"bias": "all"}, "Adapter bias is not supported"),
    "modules_to_save": ({"modules_to_save": ["lm_head"]}, "only supports modules_to_save"),
    "init": ({"init_lora_weights": "pissa"}, "does not support init_lora_weights"),
    "replication": ({"layer_replication": [[0, 2]]}, "does not support layer_replication"),
}
VISION = {**LORA, "towers": {"language": "none", "vision": "all-linear"}}


@pytest.fixture(scope="module")
def bases(tmp_path_factory):
    folder = tmp_path_factory.mktemp("bases")
    return {name: save(folder / name) for name, save in FAMILIES.items()}


@pytest.fixture(scope="module")
def adapters(bases, tmp_path_factory):
    """Family -> kind -> folder of a finished adapter."""
    folder, made = tmp_path_factory.mktemp("adapters"), {}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("tests.serving.adapters.KINDS", {**KINDS, **SERVED, "vision": VISION})
        for family in LAYERS:
            base = load_base(str(bases[family]), device="cpu")
            kinds = [*SERVED, *(REFUSED if family == "idefics3" else ["dora"])]
            made[family] = {kind: make_adapter(base, kind, folder / family / kind) for kind in kinds}
    return made


@pytest.fixture(scope="module")
def exported(bases, adapters, tmp_path_factory):
    """Family -> kind -> folder that the target wrote."""
    folder = tmp_path_factory.mktemp("exported")
    return {
        family: {
            kind: export_adapter(
                adapters[family][kind], to="vllm", output=folder / family / kind, base=str(bases[family])
            ).folder
            for kind in SERVED
        }
        for family in adapters
    }


@pytest.fixture(scope="module")
def found(bases, adapters, exported, inside, tmp_path_factory):
    """What vLLM says of everything, in one process of its own."""
    impossible, config = {}, json.loads((exported["idefics3"]["lora"] / "adapter_config.json").read_text())
    for name, (change, _) in INCOMPATIBLE.items():
        folder = tmp_path_factory.mktemp(name)
        (folder / "adapter_config.json").write_text(json.dumps({**config, **change}))
        (folder / "adapter_model.safetensors").hardlink_to(exported["idefics3"]["lora"] / "adapter_model.safetensors")
        impossible[name] = folder
    jobs = []
    for family, base in bases.items():
        folders = {f"exported {kind}": path for kind, path in exported.get(family, {}).items()}
        folders |= {kind: path for kind, path in adapters.get(family, {}).items() if kind in REFUSED}
        folders |= impossible if family == "idefics3" else {}
        folders = {label: str(path) for label, path in folders.items()}
        jobs.append({"family": family, "base": str(base), "max_lora_rank": 16, "adapters": folders})
    jobs.append({**next(job for job in jobs if job["family"] == "idefics3"), "family": "low", "max_lora_rank": 8})
    return inside("loading", jobs)


@pytest.mark.parametrize("family", LAYERS)
@pytest.mark.parametrize("kind", SERVED)
def test_it_applies_all_of_what_is_exported(bases, adapters, found, family, kind):
    base, adapter = load_base(str(bases[family]), device="cpu"), read_folder(adapters[family][kind])
    wanted = {
        name.removeprefix(LAYERS[family]): (update.up.double() @ update.down.double()).norm().item() * update.scaling
        for name, update in updates(base.model, adapter.manifest.adapter, adapter.tensors).items()
    }
    of_vllm = found[family]["adapters"][f"exported {kind}"]
    got = {name.partition(".layers.")[2]: norm for name, norm in of_vllm["updates"].items()}
    print(f"{family}, {kind}: {found[family]['class']} applies {len(got)} of {len(wanted)} modules")
    assert got == pytest.approx(wanted, rel=1e-5)


@pytest.mark.parametrize("family", WITHOUT_LORA)
def test_it_does_not_start_where_we_list_no_lora(found, family):
    assert "LoRA is not supported for" in found[family]["start"]


@pytest.mark.parametrize("family", LAYERS)
def test_it_refuses_dora_on_every_family(adapters, found, family):
    with pytest.raises(ExportError, match="it supports no DoRA"):
        refuse_for_vllm(read_folder(adapters[family]["dora"]).manifest, max_lora_rank=16)
    assert REFUSED["dora"] in found[family]["adapters"]["dora"]["refused"]


@pytest.mark.parametrize("kind", REFUSED)
def test_what_we_refuse_it_refuses_or_serves_in_part(adapters, found, kind):
    manifest = read_folder(adapters["idefics3"][kind]).manifest
    with pytest.raises(ExportError):
        refuse_for_vllm(manifest, max_lora_rank=16)
    of_vllm = found["idefics3"]["adapters"][kind]
    if REFUSED[kind] is not None:
        assert REFUSED[kind] in of_vllm["refused"]
        return
    modules = manifest.adapter.parts[0].modules
    print(f"{kind}: applies {len(of_vllm['updates'])} of {sum(map(len, modules.values()))} modules, and says nothing")
    assert len(of_vllm["updates"]) == len(modules.get("language", []))


@pytest.mark.parametrize("change", INCOMPATIBLE)
def test_it_refuses_what_no_manifest_can_hold(found, change):
    assert INCOMPATIBLE[change][1] in found["idefics3"]["adapters"][change]["refused"]


def test_a_rank_over_its_limit(adapters, found):
    manifest = read_folder(adapters["idefics3"]["wide lora"]).manifest
    with pytest.raises(ExportError, match="must be at most --max-lora-rank 8, got 12"):
        refuse_for_vllm(manifest, max_lora_rank=8)
    assert "LoRA rank 12 is greater than max_lora_rank 8" in found["low"]["adapters"]["exported wide lora"]["refused"]
    assert "updates" in found["low"]["adapters"]["exported lora"]
