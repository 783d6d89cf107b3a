"""LoRA on towers: resolved by full name, refused when it would do nothing, gone without a trace."""

import pytest
import torch

from finetune.assemble.loading import load_base
from finetune.errors import MethodError, ModelError
from finetune.families.base import family_of
from finetune.methods.adapter import attach, detach
from finetune.recipe import LoraSection, TowerTargets, TrainSection
from finetune.training.optimizer import make_optimizer, set_learning_rate
from tests.matrix import state


def load(folder):
    return load_base(str(folder), device="cpu")


def lora(**towers):
    return [LoraSection(name="lora", r=4, lora_alpha=8, towers=TowerTargets.model_validate(towers))]


def test_every_tower_is_adapted_by_full_name_with_its_own_rank(tiny_base):
    base = load(tiny_base)
    model, towers = base.model, base.towers
    methods = lora(language="all-linear", projector={"target_modules": "all-linear", "r": 2})
    attachment = attach(base.host, methods)
    (part,) = attachment.parts
    assert len(part.modules["language"]) == 14  # 7 in each of 2 layers
    assert all(name.startswith(towers["language"][0]) for name in part.modules["language"])
    assert part.modules["projector"] and "vision" not in part.modules
    ranks = {name: p.shape[0] for name, p in attachment.parameters.items() if "lora_A" in name}
    assert {r for name, r in ranks.items() if towers["projector"][0] in name} == {2}
    assert {r for name, r in ranks.items() if towers["language"][0] in name} == {4}
    trainable = {id(p) for p in model.parameters() if p.requires_grad}
    assert trainable == {id(p) for p in attachment.parameters.values()}
    assert "14 modules" in attachment.describe()


def test_a_fresh_adapter_changes_nothing_and_detach_leaves_no_trace(tiny_base):
    base = load(tiny_base)
    model = base.model
    before, names = state(model), [name for name, _ in model.named_modules()]
    attachment = attach(base.host, lora())
    assert all(not p.any() for name, p in attachment.parameters.items() if "lora_B" in name)
    detach(model)
    assert [name for name, _ in model.named_modules()] == names
    assert not hasattr(model, "peft_config")
    after = state(model)
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_a_wrapped_model_is_refused(tiny_fast_vlm):
    base = load(tiny_fast_vlm)
    attach(base.host, lora())
    with pytest.raises(MethodError, match="must not carry an adapter, but has one at "):
        attach(base.host, lora())


@pytest.mark.parametrize(
    ("towers", "message"),
    [
        ({"vision": "all-linear"}, "the vision tower has no linear module"),
        ({"language": ["q_prooj"]}, "'q_prooj' matches no linear module.*Did you mean 'q_proj'"),
        ({"projector": ["q_proj"]}, "'q_proj' matches no linear module of the projector tower"),
    ],
)
def test_a_target_that_matches_nothing_is_an_error(tiny_fast_vlm, towers, message):
    base = load(tiny_fast_vlm)
    with pytest.raises(MethodError, match=message):
        attach(base.host, lora(**towers))
    assert not hasattr(base.model, "peft_config")


def test_a_name_means_its_tower_only(tiny_base):
    base = load(tiny_base)
    model = base.model
    (part,) = attach(base.host, lora(language=["q_proj"])).parts
    assert len(part.modules["language"]) == 2
    layers = [name for name, module in model.named_modules() if hasattr(module, "lora_A")]
    assert layers == part.modules["language"]


def test_a_family_that_is_not_there_is_named(tmp_path):
    (tmp_path / "config.json").write_text('{"model_type": "gpt2"}')
    with pytest.raises(ModelError, match="must be a vision-language model of transformers, got gpt2.*fast_vlm, gemma3"):
        family_of(str(tmp_path))
    with pytest.raises(ModelError, match="no model at"):
        family_of(str(tmp_path / "nothing"))


def test_a_tower_learns_at_a_rate_of_its_own(tiny_base):
    """And B of it faster still, where LoRA+ says so."""
    base = load(tiny_base)
    (section,) = lora(language="all-linear", projector={"target_modules": "all-linear", "lr_ratio": 0.1})
    attachment = attach(base.host, [section.model_copy(update={"loraplus_lr_ratio": 4.0, "use_dora": True})])
    rates = {name: attachment.learning_rates.get(name, 1.0) for name in attachment.parameters}
    for tower, a, b in (("language", 1.0, 4.0), ("projector", 0.1, 0.4)):
        (path,) = base.towers[tower]
        inside = {name: rate for name, rate in rates.items() if f".{path}." in name}
        assert {rate for name, rate in inside.items() if "lora_B" not in name} == {a}
        assert {rate for name, rate in inside.items() if "lora_B" in name} == {b}
    optimizer = make_optimizer(attachment, TrainSection(max_steps=1, learning_rate=1e-2))
    set_learning_rate(optimizer, 1e-3)
    assert {group["lr"] for group in optimizer.param_groups} == {1e-3, 4e-3, 1e-4, 4e-4}
    assert "lr_ratio" not in attachment.parts[0].options
