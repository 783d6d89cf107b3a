"""A head in the place of the language head, on every family that has one; the base's own is never written."""

import pytest
import torch

from finetune.assemble.loading import load_base
from finetune.errors import ManifestError, MethodError
from finetune.methods.adapter import attach, detach, expected_tensors, merge, switch, updates
from finetune.methods.hooks import ActiveAdapter, AdapterHooks
from finetune.recipe import HeadSection
from finetune.runs.saving import describe
from tests.matrix import logits, rows, state
from tests.tiny import FAMILIES

HEAD = HeadSection(num_outputs=3)
GENERATIVE = sorted(set(FAMILIES) - {"clip"})


@pytest.mark.parametrize("family", GENERATIVE)
def test_it_stands_for_the_language_head_while_it_answers(family, tmp_path):
    base = load_base(str(FAMILIES[family](tmp_path / family)), device="cpu")
    batch = base.collator.training_batch([(row, True) for row in rows()])
    before, plain = state(base.model), logits(base, batch)
    attachment = attach(base.host, [HEAD])
    (part,) = attachment.parts
    assert part.options == {"num_outputs": 3} and all(p.shape[0] == 3 for p in attachment.parameters.values())
    mine = logits(base, batch)
    assert mine.shape == (*plain.shape[:2], 3)
    hidden = base.model(**batch.inputs, output_hidden_states=True).hidden_states[-1].float()
    (weight,) = (p for p in attachment.parameters.values() if p.ndim == 2)
    if not getattr(base.model.config.get_text_config(), "final_logit_softcapping", None):
        assert torch.allclose(mine, hidden @ weight.T, atol=1e-5), "it is given what the language head is given"
    switch(base.model, on=False)
    assert torch.equal(logits(base, batch), plain)
    switch(base.model, on=True)
    attachment.freeze()
    description = describe(attachment, family)
    detach(base.model)
    assert torch.equal(logits(base, batch), plain)
    assert {name: (*p.shape,) for name, p in attachment.parameters.items()} == expected_tensors(
        base.model, base.towers, description
    )
    hooks, found = AdapterHooks(), updates(base.model, description, attachment.parameters)
    hooks.add(found)
    with hooks.using(ActiveAdapter(updates=found)):
        assert torch.equal(logits(base, batch), mine)
    assert torch.equal(logits(base, batch), plain)
    hooks.remove(found)
    assert all(torch.equal(tensor, before[name]) for name, tensor in state(base.model).items())
    with pytest.raises(MethodError, match="cannot be merged: a head of the task with another shape replaces it"):
        merge(found)


def test_it_trains_in_fp32_on_a_base_in_bfloat16(tiny_fast_vlm):
    base = load_base(str(tiny_fast_vlm), device="cpu", dtype="bfloat16")
    batch = base.collator.training_batch([(row, True) for row in rows()]).to("cpu", torch.bfloat16)
    attachment = attach(base.host, [HEAD])
    (weight,) = attachment.parameters.values()
    optimizer = torch.optim.SGD([weight], lr=0.5)
    classes = torch.tensor([0, 1, 0, 1])
    losses = []
    for _ in range(8):
        out = base.model(**batch.inputs, use_cache=False).logits[:, -1].float()
        losses.append(torch.nn.functional.cross_entropy(out, classes))
        losses[-1].backward()
        optimizer.step()
        optimizer.zero_grad()
    assert weight.dtype == torch.float32 and losses[-1] < losses[0]


def test_a_base_without_a_language_head_is_refused(tiny_clip):
    base = load_base(str(tiny_clip), device="cpu")
    with pytest.raises(
        MethodError, match="a head of the task needs a base with a language head, and CLIPModel has none"
    ):
        attach(base.host, [HEAD])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"options": {"num_outputs": 0}}, "num_outputs, from 1 to"),
        ({"options": {"num_outputs": True}}, "num_outputs, from 1 to"),
        ({"options": {"num_outputs": 3, "more": 1}}, "num_outputs, from 1 to"),
        (
            {"modules": {"language": ["model.embed_tokens.weight"]}},
            "a head on this base must replace lm_head.weight of the",
        ),
        (
            {"modules": {"vision": ["lm_head.weight"]}},
            "a head on this base must replace lm_head.weight of the language tower",
        ),
    ],
)
def test_a_head_from_elsewhere_replaces_nothing_else(tiny_fast_vlm, change, message):
    base = load_base(str(tiny_fast_vlm), device="cpu")
    description = describe(attach(base.host, [HEAD]), "fast_vlm")
    detach(base.model)
    part = description.parts[0].model_copy(update=change)
    with pytest.raises(ManifestError, match=message):
        expected_tensors(base.model, base.towers, description.model_copy(update={"parts": [part]}))
