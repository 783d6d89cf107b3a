"""LoRA on towers: resolved by full name, refused when it would do nothing, gone without a trace."""

import pytest
import torch

from finetune.errors import MethodError
from finetune.families.base import family_of
from finetune.methods.lora import Lora, detach
from finetune.recipe import LoraSection, TowerTargets


def load(folder):
    family = family_of(str(folder))
    model, processor = family.load(str(folder), revision=None, dtype="float32", device="cpu")
    return family, model, processor


def lora(**towers):
    return Lora(LoraSection(name="lora", r=4, lora_alpha=8, towers=TowerTargets.model_validate(towers)))


def state(model):
    return {name: tensor.clone() for name, tensor in (*model.named_parameters(), *model.named_buffers())}


def test_every_tower_is_adapted_by_full_name_with_its_own_rank(tiny_base):
    family, model, _ = load(tiny_base)
    towers = family.towers(model)
    attachment = lora(language="all-linear", projector={"target_modules": "all-linear", "r": 2}).attach(model, towers)
    assert len(attachment.modules["language"]) == 14  # 7 in each of 2 layers
    assert all(name.startswith(towers.language[0]) for name in attachment.modules["language"])
    assert attachment.modules["projector"] and "vision" not in attachment.modules
    ranks = {name: p.shape[0] for name, p in attachment.parameters.items() if "lora_A" in name}
    assert {r for name, r in ranks.items() if towers.projector[0] in name} == {2}
    assert {r for name, r in ranks.items() if towers.language[0] in name} == {4}
    trainable = {id(p) for p in model.parameters() if p.requires_grad}
    assert trainable == {id(p) for p in attachment.parameters.values()}
    assert "14 modules" in attachment.describe()


def test_a_fresh_adapter_changes_nothing_and_detach_leaves_no_trace(tiny_base):
    family, model, processor = load(tiny_base)
    before, names = state(model), [name for name, _ in model.named_modules()]
    attachment = lora().attach(model, family.towers(model))
    assert all(not p.any() for name, p in attachment.parameters.items() if "lora_B" in name)
    detach(model, "default")
    assert [name for name, _ in model.named_modules()] == names
    assert not hasattr(model, "peft_config")
    after = state(model)
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_a_wrapped_model_is_refused(tiny_fast_vlm):
    family, model, _ = load(tiny_fast_vlm)
    lora().attach(model, family.towers(model))
    with pytest.raises(MethodError, match="already carries an adapter"):
        lora().attach(model, family.towers(model))


@pytest.mark.parametrize(
    ("towers", "message"),
    [
        ({"vision": "all-linear"}, "the vision tower has no linear module"),
        ({"language": ["q_prooj"]}, "'q_prooj' matches no linear module.*Did you mean 'q_proj'"),
        ({"language": "none"}, "nothing to adapt"),
        ({"projector": ["q_proj"]}, "'q_proj' matches no linear module of the projector tower"),
    ],
)
def test_a_target_that_matches_nothing_is_an_error(tiny_fast_vlm, towers, message):
    family, model, _ = load(tiny_fast_vlm)
    with pytest.raises(MethodError, match=message):
        lora(**towers).attach(model, family.towers(model))


def test_a_name_means_its_tower_only(tiny_base):
    family, model, _ = load(tiny_base)
    attachment = lora(language=["q_proj"]).attach(model, family.towers(model))
    assert len(attachment.modules["language"]) == 2
    layers = [name for name, module in model.named_modules() if hasattr(module, "lora_A")]
    assert layers == attachment.modules["language"]


def test_a_family_that_is_not_there_is_named(tmp_path):
    from finetune.errors import ModelError

    (tmp_path / "config.json").write_text('{"model_type": "gpt2"}')
    with pytest.raises(ModelError, match="unknown model_type 'gpt2'. Allowed: fast_vlm, idefics3"):
        family_of(str(tmp_path))
    with pytest.raises(ModelError, match="no model at"):
        family_of(str(tmp_path / "nothing"))
