"""Full modules: whole parameters per adapter, the base's own never written; parts of one adapter live together."""

import pytest
import torch

from finetune.assemble.loading import load_base
from finetune.errors import ManifestError, MethodError
from finetune.methods.adapter import attach, detach, expected_tensors, merge, switch, updates
from finetune.methods.hooks import PLAIN, ActiveAdapter, AdapterHooks, reached
from finetune.runs.saving import describe
from tests.matrix import LORA, METHODS, PROMPT, extended, logits, losses, recipe_of, rows, state

BOTH = {"name": "full_modules", "parameters": ["projector", "norms"]}


@pytest.fixture
def base(tiny_fast_vlm):
    return load_base(str(tiny_fast_vlm), device="cpu")


def methods(base, method, tmp_path):
    return recipe_of(method, base.path, tmp_path).method


def learn(base, attachment):
    losses(base, attachment, extended(attachment, base.collator.training_batch(rows())), lr=0.05)
    attachment.freeze()
    return {name: parameter.detach().clone() for name, parameter in attachment.parameters.items()}


def test_the_projector_and_the_norms_of_the_language_tower_train_as_copies(base, tmp_path):
    before = state(base.model)
    attachment = attach(base.host, methods(base, BOTH, tmp_path))
    names = set(attachment.parameters)
    assert {n for n in names if "projector" in n} == {n for n in before if n.startswith("model.multi_modal_projector.")}
    assert {n for n in names if "norm" in n} == {n for n in before if n.startswith("model.language") and "norm" in n}
    trained = learn(base, attachment)
    assert all(not torch.equal(before[name], tensor) for name, tensor in trained.items())
    switch(base.model, on=False)
    assert all(torch.equal(tensor, before[name]) for name, tensor in state(base.model).items())
    switch(base.model, on=True)
    assert all(torch.equal(state(base.model)[name], tensor) for name, tensor in trained.items())


def test_two_adapters_swap_and_leave_in_any_order(base, tmp_path):
    batch = base.collator.training_batch(rows())
    plain = logits(base, batch)
    saved = {}
    for name, method in (
        ("a_1", BOTH),
        ("a_2", [LORA, {"name": "full_modules", "parameters": ["norms"]}]),
        ("a_3", LORA),
    ):
        attachment = attach(base.host, methods(base, method, tmp_path))
        tensors = learn(base, attachment)
        saved[name] = (describe(attachment, "fast_vlm"), tensors, logits(base, batch))
        detach(base.model)
    assert torch.equal(logits(base, batch), plain)
    before, hooks, loaded_adapters = state(base.model), AdapterHooks(), {None: PLAIN}
    for name, (description, tensors, _) in saved.items():
        assert set(expected_tensors(base.model, base.towers, description)) == set(tensors)
        loaded_adapters[name] = ActiveAdapter(updates=updates(base.model, description, tensors))
        hooks.add(loaded_adapters[name].updates)
    for name in ("a_2", "a_1", None, "a_3", "a_1", "a_2"):
        with hooks.using(loaded_adapters[name]):
            wanted = plain if name is None else saved[name][2]
            assert torch.equal(logits(base, batch), wanted), name
    hooks.remove(loaded_adapters["a_1"].updates)
    with hooks.using(loaded_adapters["a_2"]):
        assert torch.equal(logits(base, batch), saved["a_2"][2])
    for name in ("a_2", "a_3"):
        hooks.remove(loaded_adapters[name].updates)
    assert torch.equal(logits(base, batch), plain) and not reached(base.model)
    assert all(torch.equal(tensor, before[name]) for name, tensor in state(base.model).items())


def test_copies_train_in_fp32_on_a_base_in_bfloat16(tiny_fast_vlm, tmp_path):
    base = load_base(str(tiny_fast_vlm), device="cpu", dtype="bfloat16")
    attachment = attach(base.host, methods(base, BOTH, tmp_path))
    assert {parameter.dtype for parameter in attachment.parameters.values()} == {torch.float32}
    batch = extended(attachment, base.collator.training_batch(rows())).to("cpu", torch.bfloat16)
    found = losses(base, attachment, batch, lr=0.05)
    assert found[-1] < found[0]


def test_lora_and_full_training_of_one_projector_are_refused(base, tmp_path):
    both = [METHODS["lora-projector"], {"name": "full_modules", "parameters": ["projector"]}]
    with pytest.raises(MethodError, match="LoRA adapts .*, so full_modules cannot train it too"):
        attach(base.host, methods(base, both, tmp_path))
    assert not hasattr(base.model, "peft_config")  # what was attached before the refusal is gone


@pytest.mark.parametrize(
    ("name", "message"),
    [
        (
            "model.vision_tower.conv_stem.first_conv.convolution.weight",
            "full_modules must be of the projector or of norms",
        ),
        ("model.language_model.embed_tokens.weight", "full_modules must be of the projector or of norms"),
        ("lm_head.weight", "full_modules must be of the projector or of norms"),
        ("model.nowhere.weight", "no parameter 'model.nowhere.weight'"),
    ],
)
def test_an_adapter_from_elsewhere_replaces_nothing_else(base, tmp_path, name, message):
    attachment = attach(base.host, methods(base, BOTH, tmp_path))
    description = describe(attachment, "fast_vlm")
    detach(base.model)
    for names in (description.parts[0].options["parameters"], description.parts[0].modules["language"]):
        names.append(name)
    with pytest.raises(ManifestError, match=message):
        expected_tensors(base.model, base.towers, description)


def test_lora_with_other_methods_merges_as_a_whole_or_not_at_all(base, tmp_path):
    batch = base.collator.training_batch(rows())
    attachment = attach(base.host, methods(base, [LORA, BOTH], tmp_path))
    learn(base, attachment)
    adapted = logits(base, batch)
    found = updates(base.model, describe(attachment, "fast_vlm"), attachment.parameters)
    detach(base.model)
    merge(found)
    assert torch.allclose(logits(base, batch), adapted, atol=1e-5 * adapted.abs().max())
    assert not hasattr(base.model, "peft_config")
    fresh = load_base(base.path, device="cpu")
    before = state(fresh.model)
    attachment = attach(fresh.host, methods(fresh, [LORA, PROMPT], tmp_path))
    learn(fresh, attachment)
    found = updates(fresh.model, describe(attachment, "fast_vlm"), attachment.parameters)
    detach(fresh.model)
    with pytest.raises(MethodError, match="a tuned prompt cannot be merged"):
        merge(found)
    assert all(torch.equal(tensor, before[name]) for name, tensor in state(fresh.model).items())


def test_lora_plus_and_the_ratios_reach_the_optimizer(base, tmp_path):
    section = [{**LORA, "loraplus_lr_ratio": 4.0}, {**PROMPT, "lr_ratio": 10.0}]
    attachment = attach(base.host, methods(base, section, tmp_path))
    factors = attachment.learning_rates
    assert {factors[name] for name in factors if "lora_B" in name} == {4.0}
    assert factors["prompt_embeddings"] == 10.0
    assert not any("lora_A" in name for name in factors)


def test_merging_goes_into_the_base_and_not_into_another_adapters_copy(base, tmp_path):
    batch = base.collator.training_batch(rows())
    saved = {}
    for name, method in (
        ("a_1", METHODS["lora-projector"]),
        ("a_2", {"name": "full_modules", "parameters": ["projector"]}),
    ):
        attachment = attach(base.host, methods(base, method, tmp_path))
        tensors = learn(base, attachment)
        saved[name] = (describe(attachment, "fast_vlm"), tensors, logits(base, batch))
        detach(base.model)
    hooks = AdapterHooks()
    loaded_adapters = {name: updates(base.model, *pair[:2]) for name, pair in saved.items()}
    hooks.add(loaded_adapters["a_2"])
    with hooks.using(ActiveAdapter(updates=loaded_adapters["a_2"])):
        merge(loaded_adapters["a_1"])
        assert torch.equal(logits(base, batch), saved["a_2"][2])
    merged, alone = logits(base, batch), saved["a_1"][2]
    assert torch.allclose(merged, alone, atol=1e-5 * alone.abs().max())
