"""Architectures and towers are open words: one that is not known here is an error, wherever it matters."""

import pytest
import torch
from torch import nn

from finetune.assemble.loading import check_method, load_base
from finetune.errors import ExportError, ManifestError, MethodError, ModelError
from finetune.export.gguf import Gguf
from finetune.export.onnx import Onnx
from finetune.families.base import family_of
from finetune.families.idefics3 import Idefics3Family
from finetune.interfaces import Host
from finetune.methods.adapter import attach, detach, expected_tensors
from finetune.model_types import architecture_of, family_entry, generic_model_types
from finetune.playground.playground import Playground
from finetune.recipe import LoraSection, TowerTargets, why_incompatible
from finetune.runs.saving import describe
from finetune.tables import FAMILIES, FamilyEntry
from tests.matrix import recipe_of
from tests.tiny import save_idefics3

LORA = {"name": "lora", "r": 2}


@pytest.fixture
def strange(tmp_path, monkeypatch):
    """A tiny base whose family says an architecture that nothing here knows."""
    folder = save_idefics3(tmp_path / "base")
    monkeypatch.setattr(Idefics3Family, "architecture", "fusion_encoder")
    return folder


def test_what_is_known_of_a_model_type():
    assert architecture_of("clip") == "dual_encoder"
    assert architecture_of("qwen3_vl") == "generative"
    assert "mistral3" not in FAMILIES and architecture_of("mistral3") == "generative"
    assert architecture_of("new_vlm") is None and family_entry("new_vlm") is None


def test_types_that_cannot_be_found_out_are_not_known(monkeypatch):
    generic_model_types.cache_clear()
    monkeypatch.setattr("finetune.model_types.find_spec", lambda name: None)
    try:
        assert (architecture_of("mistral3"), architecture_of("llava")) == (None, "generative")
    finally:
        generic_model_types.cache_clear()


def test_a_class_gives_the_architecture_where_the_type_is_not_known():
    assert why_incompatible("vqa", "new_vlm") is None
    assert "but new_vlm is dual_encoder" in why_incompatible("vqa", "new_vlm", architecture="dual_encoder")


UNKNOWN = "no task supports a base of the architecture 'fusion_encoder'"


def test_a_base_of_an_unknown_architecture_is_refused_before_its_weights(strange, tmp_path, monkeypatch):
    recipe = recipe_of(LORA, strange, tmp_path)
    monkeypatch.setattr(Idefics3Family, "load", None)
    with pytest.raises(ModelError, match=UNKNOWN):
        load_base(str(strange))
    with pytest.raises(ModelError, match=UNKNOWN):
        check_method(recipe)


def test_a_loaded_base_of_an_unknown_architecture_is_asked_nothing(tmp_path, monkeypatch):
    from finetune.server.run import serve
    from finetune.server.settings import Settings
    from finetune.serving.vision_language_model import VisionLanguageModel

    vlm = VisionLanguageModel(load_base(str(save_idefics3(tmp_path / "base")), device="cpu"), registry=tmp_path)
    monkeypatch.setattr(Idefics3Family, "architecture", "fusion_encoder")
    with pytest.raises(ModelError, match="no task supports a base of the architecture 'fusion_encoder'"):
        vlm.base.default_task  # noqa: B018
    with pytest.raises(ModelError, match="architecture of the served base must be generative, got fusion_encoder"):
        serve(vlm, [], Settings(), listener=None, begun=0.0)
    with pytest.raises(ModelError, match=UNKNOWN):
        Playground(vlm, base="x", registry=vlm.switcher, refs=[], examples=[])


@pytest.mark.parametrize(
    ("target", "named"),
    [
        (Onnx(), r"must be dual_encoder, got fusion_encoder \(idefics3\). .* --to merged"),
        (Gguf(), r"must be generative, got fusion_encoder \(idefics3\). .* --to merged"),
    ],
)
def test_an_adapter_of_an_unknown_architecture_goes_nowhere(target, named, monkeypatch, adapter_manifest):
    monkeypatch.setitem(FAMILIES, "idefics3", FamilyEntry("somewhere:Else", architecture="fusion_encoder"))
    with pytest.raises(ExportError, match=f"the architecture of its base {named}"):
        target.refuse(adapter_manifest)
    monkeypatch.delitem(FAMILIES, "idefics3")
    monkeypatch.setattr("finetune.model_types.generic_model_types", lambda: None)
    with pytest.raises(ExportError, match=r"the architecture of its base must be .*, got an unknown one \(idefics3\)"):
        target.refuse(adapter_manifest)


@pytest.fixture
def adapter_manifest():
    """As much of a manifest as a refusal looks at."""
    from types import SimpleNamespace

    base = SimpleNamespace(model_type="idefics3")
    return SimpleNamespace(full_name="medical/brain", base=base, adapter=SimpleNamespace(parts=[]))


class Fused(nn.Module):
    """A model without a language tower, and with one that fuses."""

    def __init__(self):
        super().__init__()
        self.eye, self.fuse = nn.Linear(3, 4, bias=False), nn.ModuleDict({"mix": nn.Linear(4, 2, bias=False)})

    def forward(self, x):
        return self.fuse["mix"](self.eye(x))

    def get_input_embeddings(self):
        raise NotImplementedError


TOWERS = {"vision": ("eye",), "fusion": ("fuse",)}


def fused() -> Host:
    model = Fused().requires_grad_(False).eval()
    return Host(model, TOWERS, None, lambda: model(torch.ones(1, 3)))


def lora(**towers):
    return [LoraSection(name="lora", r=4, towers=TowerTargets.model_validate(towers))]


def test_lora_on_a_tower_of_another_name():
    host = fused()
    attachment = attach(host, lora(fusion={"target_modules": ["mix"], "r": 2, "lr_ratio": 3.0}, vision="all-linear"))
    (part,) = attachment.parts
    assert part.modules == {"vision": ["eye"], "fusion": ["fuse.mix"]}
    assert part.options["rank_pattern"] == {"fuse.mix": 2}
    assert part.learning_rates == {f"base_model.model.fuse.mix.lora_{kind}.weight": 3.0 for kind in "AB"}
    assert part.notes == ("no language tower: this base has vision, fusion",)
    description = describe(attachment, "toy")
    detach(host.model)
    assert expected_tensors(host.model, TOWERS, description) == {
        "base_model.model.eye.lora_A.weight": (4, 3), "base_model.model.eye.lora_B.weight": (4, 4),
        "base_model.model.fuse.mix.lora_A.weight": (2, 4), "base_model.model.fuse.mix.lora_B.weight": (2, 2),
    }  # fmt: skip
    with pytest.raises(
        ManifestError, match="the adapter changes modules of the tower 'fusion', but this base only has vision"
    ):
        expected_tensors(host.model, {"vision": ("eye",)}, description)


@pytest.mark.parametrize(
    ("towers", "message"),
    [
        ({"fusoin": "all-linear"}, r"method\.towers\.fusoin: the base has no such tower\. Did you mean 'fusion'\?"),
        ({"projector": "all-linear"}, r"towers\.projector: the base has no such tower\. It has vision, fusion\."),
        (
            {},
            r"method\.towers: at least one tower of the base must be adapted, got none for every tower \(vision, fu",
        ),
    ],
)
def test_a_tower_that_the_base_lacks(towers, message):
    host = fused()
    with pytest.raises(MethodError, match=message):
        attach(host, lora(**towers))
    assert [name for name, _ in host.model.named_parameters()] == ["eye.weight", "fuse.mix.weight"]


def test_full_modules_where_there_is_no_such_tower():
    from finetune.recipe import FullModulesSection

    for kind in ("projector", "norms"):
        with pytest.raises(MethodError, match=f"this base has no {kind} to train"):
            attach(fused(), [FullModulesSection(name="full_modules", parameters=[kind])])


def test_without_a_language_tower_nothing_is_quantized(tmp_path, monkeypatch):
    folder = save_idefics3(tmp_path / "base")
    monkeypatch.setattr(Idefics3Family, "tower_paths", {"vision": ("model.vision_model",)})
    with pytest.raises(ModelError, match="only a language tower can be quantized, but this base only has vision. Set"):
        family_of(str(folder)).load(str(folder), quantization="8bit")
