"""A tuned prompt is right on every family: masks, positions, padding, caches, gradients, and PEFT where PEFT agrees."""

import json

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForImageTextToText

from finetune.assemble.loading import load_base
from finetune.core.batch import Batch, Placeholders
from finetune.errors import AdapterError, ManifestError, MethodError
from finetune.methods.adapter import attach, detach, expected_tensors, merge, switch, updates
from finetune.methods.prompt_tuning import placeholders_of
from finetune.runs.saving import describe, save_weights
from finetune.tables import PEFT_PROMPTS
from tests.matrix import PROMPT, extended, logits, recipe_of, rows


def close(one, other):
    """Logits that agree, though made in batches of other shapes, whose products a CPU may add in another order."""
    return (one - other).abs().max() <= 1e-4 * one.abs().max()


@pytest.fixture(scope="module")
def prompted(tiny_family, tmp_path_factory):
    """A base with a random prompt active: (base, attachment)."""
    torch.manual_seed(0)
    base = load_base(str(tiny_family), device="cpu")
    attachment = attach(base.host, recipe_of(PROMPT, tiny_family, tmp_path_factory.mktemp("runs")).method)
    with torch.no_grad():
        for parameter in attachment.parameters.values():
            parameter.add_(torch.randn_like(parameter))
    base.model.eval()
    return base, attachment


def test_an_answer_never_sees_what_follows_it(prompted):
    base, attachment = prompted
    batch = extended(attachment, base.collator.training_batch(rows(1)))
    last = int(batch.inputs["attention_mask"][0].sum()) - 1
    before = logits(base, batch)
    batch.inputs["input_ids"][0, last] = (batch.inputs["input_ids"][0, last] + 7) % 200 + 20
    after = logits(base, batch)
    assert not torch.allclose(before[0, last], after[0, last], atol=1e-3)
    first_supervised = int((batch.labels[0] != -100).int().argmax()) - 1
    assert torch.allclose(before[0, first_supervised:last], after[0, first_supervised:last], atol=1e-6)


def test_left_and_right_padding_agree_and_rows_do_not_disturb_each_other(prompted):
    base, attachment = prompted
    examples = rows(3)
    texts = [base.collator.render(example.messages) for example in examples]
    found = {}
    for side in ("left", "right"):
        inputs = base.collator._encode(texts, examples, side)
        batch = extended(attachment, Batch(inputs, examples))
        out, mask = logits(base, batch), batch.inputs["attention_mask"].bool()
        found[side] = [row[keep] for row, keep in zip(out, mask, strict=True)]
    alone = extended(attachment, Batch(base.collator._encode(texts[:1], examples[:1], "right"), examples[:1]))
    for left, right in zip(found["left"], found["right"], strict=True):
        assert close(left, right)
    assert close(found["left"][0], logits(base, alone)[0])


def generate(base, batch, **options):
    return base.model.generate(
        **batch.inputs,
        max_new_tokens=4,
        min_new_tokens=4,
        do_sample=False,
        return_dict_in_generate=True,
        output_logits=True,
        **options,
    )


def test_training_and_generation_give_the_same_logits_cached_or_not(prompted):
    base, attachment = prompted
    for count in (4, 3):  # a second batch of another size: positions of the first must not linger
        examples = rows(count)
        batch = extended(attachment, base.collator.prompt_batch(examples))
        width = batch.inputs["input_ids"].shape[1]
        made = generate(base, batch)
        ids = made.sequences
        new = ids.shape[1] - width
        longer = dict(batch.inputs) | {"input_ids": ids}
        for name, fill in (("attention_mask", 1), ("token_type_ids", None), ("mm_token_type_ids", 0)):
            if name in longer:
                # PaliGemma's answers are of type 1, Gemma 3's text is of type 0
                value = (1 if base.identity.model_type == "paligemma" else 0) if fill is None else fill
                longer[name] = torch.cat([longer[name], longer[name].new_full((count, new), value)], dim=1)
        forward = logits(base, Batch(longer, examples))[:, width - 1 : -1]
        generated = torch.stack(made.logits, dim=1)
        assert close(forward, generated)
        assert torch.equal(generate(base, batch, use_cache=False).sequences, ids)


def test_beams_and_repetition_penalty_do_not_see_the_placeholders(prompted):
    base, attachment = prompted
    batch = extended(attachment, base.collator.prompt_batch(rows(2)))
    cached, plain = (generate(base, batch, num_beams=2, use_cache=use).sequences for use in (True, False))
    assert torch.equal(cached, plain)
    penalised = generate(base, batch, repetition_penalty=5.0, output_scores=True)
    ids = batch.inputs["input_ids"]
    for row in range(2):
        raw, scored = penalised.logits[0][row], penalised.scores[0][row]
        moved = set(torch.nonzero((raw - scored).abs() > 1e-6).flatten().tolist())
        moved.discard(base.model.generation_config.eos_token_id)  # held back by min_new_tokens
        assert moved and moved <= set(ids[row].tolist())


def test_gradient_checkpointing_gives_the_same_gradient(prompted):
    base, attachment = prompted
    batch = extended(attachment, base.collator.training_batch(rows(2)))
    (parameter,) = attachment.parameters.values()
    found = []
    for checkpointing in (False, True):
        if checkpointing:
            base.model.activation_checkpointing_enable()
            base.model.get_submodule(base.towers["language"][0]).train()
        loss = base.model(**batch.inputs, use_cache=False).logits.square().mean()
        found += torch.autograd.grad(loss, parameter)
    base.model.activation_checkpointing_disable()
    base.model.eval()
    assert found[0].abs().max() > 0
    assert torch.allclose(*found, atol=1e-6)


def test_a_batch_without_its_places_is_refused_and_the_plain_base_is_untouched(prompted):
    base, attachment = prompted
    batch = base.collator.prompt_batch(rows(2))
    with pytest.raises(AdapterError, match="must begin with the 5 placeholders"):
        logits(base, batch)
    switch(base.model, on=False)
    off = logits(base, batch)
    switch(base.model, on=True)
    fresh = load_base(base.path, device="cpu")
    assert torch.equal(off, logits(fresh, batch))


def test_a_prompt_cannot_be_merged(prompted):
    base, attachment = prompted
    found = updates(base.model, describe(attachment, base.identity.model_type), attachment.parameters)
    with pytest.raises(MethodError, match="a tuned prompt cannot be merged"):
        merge(found)


def test_peft_opens_it_and_agrees_or_refuses_it_by_name(prompted, tmp_path):
    base, attachment = prompted
    model_type = base.identity.model_type
    save_weights(tmp_path / "adapter", attachment, attachment.parameters, model_type=model_type)
    plain = AutoModelForImageTextToText.from_pretrained(base.path, dtype=torch.float32).eval()
    if model_type not in PEFT_PROMPTS:
        assert describe(attachment, model_type).peft_type == "FINETUNE_VLM"
        with pytest.raises(Exception, match="FINETUNE_VLM"):
            PeftModel.from_pretrained(plain, tmp_path / "adapter")
        return
    batch = base.collator.training_batch(rows(2))
    ours = logits(base, extended(attachment, batch))
    peft_model = PeftModel.from_pretrained(plain, tmp_path / "adapter").eval()
    with torch.no_grad():
        theirs = peft_model(**batch.inputs).logits
    assert close(ours, theirs)


def test_placeholders_stand_after_left_padding():
    batch = Batch(
        {
            "input_ids": torch.tensor([[0, 0, 5, 6], [1, 2, 3, 4]]),
            "attention_mask": torch.tensor([[0, 0, 1, 1], [1, 1, 1, 1]]),
            "mm_token_type_ids": torch.tensor([[0, 0, 1, 0], [0, 1, 1, 0]]),
            "pixel_values": torch.ones(2, 4),
        },
        [],
        torch.tensor([[-100, -100, -100, 6], [-100, -100, 3, 4]]),
    )
    longer = Placeholders(2, 9).insert(batch)
    assert longer.inputs["input_ids"].tolist() == [[0, 0, 9, 9, 5, 6], [9, 9, 1, 2, 3, 4]]
    assert longer.inputs["attention_mask"].tolist() == [[0, 0, 1, 1, 1, 1], [1, 1, 1, 1, 1, 1]]
    assert longer.inputs["mm_token_type_ids"].tolist() == [[0, 0, 0, 0, 1, 0], [0, 0, 0, 1, 1, 0]]
    assert longer.labels.tolist() == [[-100] * 5 + [6], [-100] * 4 + [3, 4]]
    assert torch.equal(longer.inputs["pixel_values"], batch.inputs["pixel_values"])


def batch_of(*masks, extra=(), labels=True):
    """A batch of rows with these masks, with random values of every per-token input named and supervised ends."""
    mask = torch.tensor(masks)
    shape = tuple(mask.shape)
    inputs = {"input_ids": torch.randint(1, 90, shape), "attention_mask": mask, "pixel_values": torch.rand(2, 3, 4)}
    inputs |= {name: torch.randint(0, 2, (*shape, *more)) for name, more in extra}
    supervised = torch.where(mask.bool() & (torch.arange(shape[1]) > shape[1] - 3), inputs["input_ids"], -100)
    return Batch(inputs, ["one", "two"], supervised if labels else None)


@pytest.mark.parametrize("num_virtual_tokens", [1, 3])
@pytest.mark.parametrize(
    "batch",
    [
        batch_of([1, 1, 1, 1], [1, 1, 1, 1]),
        batch_of([0, 0, 1, 1, 1], [1, 1, 1, 1, 1]),
        batch_of([1, 1, 1, 1, 0], [1, 1, 0, 0, 0]),
        batch_of([0, 1, 1, 1, 0], [0, 0, 1, 1, 1]),
        batch_of([0, 0, 0, 0], [0, 1, 1, 1], labels=False),
        batch_of([1, 1, 1, 1], [1, 1, 1, 1], extra=[("token_type_ids", ()), ("mm_token_type_ids", ())]),
        batch_of([0, 1, 1, 1], [1, 1, 1, 1], extra=[("cross_attention_mask", (2, 3))], labels=False),
    ],
    ids=["whole", "left", "right", "both", "empty row", "types", "cross attention"],
)
def test_removing_placeholders_is_the_inverse_of_inserting_them(batch, num_virtual_tokens):
    places = Placeholders(num_virtual_tokens, 9)
    longer = places.insert(batch)
    found = places.remove(longer)
    assert longer.inputs["input_ids"].shape != batch.inputs["input_ids"].shape
    assert found.inputs.keys() == batch.inputs.keys() and found.examples == batch.examples
    for name, tensor in batch.inputs.items():
        assert torch.equal(found.inputs[name], tensor) and found.inputs[name].dtype == tensor.dtype, name
    if batch.labels is None:
        assert found.labels is None and found.targets is None
    else:
        assert torch.equal(found.labels, batch.labels) and len(batch.targets.tokens) > 0
        assert torch.equal(found.targets.predictors, batch.targets.predictors)
        assert torch.equal(found.targets.tokens, batch.targets.tokens)


def test_removing_placeholders_of_every_familys_batches(tiny_family):
    base = load_base(str(tiny_family), device="cpu")
    places = Placeholders(5, 9)
    for batch in (base.collator.training_batch([(r, True) for r in rows()]), base.collator.prompt_batch(rows())):
        found = places.remove(places.insert(batch))
        for name, value in batch.inputs.items():
            assert found.inputs[name] is value or torch.equal(found.inputs[name], value), name
        if batch.labels is not None:
            assert torch.equal(found.labels, batch.labels)
            assert torch.equal(found.targets.predictors, batch.targets.predictors)


def test_the_prompt_starts_from_a_text(tiny_fast_vlm, tmp_path):
    base = load_base(str(tiny_fast_vlm), device="cpu")
    method = {"name": "prompt_tuning", "num_virtual_tokens": 5, "prompt_tuning_init_text": "What color"}
    attachment = attach(base.host, recipe_of(method, tiny_fast_vlm, tmp_path).method)
    ids = base.processor.tokenizer("What color", add_special_tokens=False)["input_ids"]
    expected = base.model.get_input_embeddings().weight[torch.tensor((ids * 5)[:5])]
    (parameter,) = attachment.parameters.values()
    assert torch.equal(parameter, expected)
    detach(base.model)
    names = [name for name, _ in base.model.named_modules()]
    assert names == [name for name, _ in load_base(str(tiny_fast_vlm), device="cpu").model.named_modules()]
    assert not base.model._forward_pre_hooks and not base.model.get_input_embeddings()._forward_hooks


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"num_virtual_tokens": 5, "token_dim": 8},
        {"num_virtual_tokens": 5, "token_dim": 8, "placeholder_token_id": "x"},
        {"num_virtual_tokens": 0, "token_dim": 8, "placeholder_token_id": 1},
        {"num_virtual_tokens": 10**9, "token_dim": 8, "placeholder_token_id": 1},
        {"num_virtual_tokens": 5, "token_dim": 8, "placeholder_token_id": 1, "more": 1},
    ],
    ids=json.dumps,
)
def test_options_from_elsewhere_are_checked(options):
    with pytest.raises(ManifestError, match="num_virtual_tokens"):
        placeholders_of(options)


def test_the_core_of_the_model_sees_the_prompt_also_after_a_generation(prompted):
    base, attachment = prompted
    batch = extended(attachment, base.collator.prompt_batch(rows(1)))
    core = base.model.model
    before = core(**batch.inputs).last_hidden_state
    generate(base, batch)
    assert torch.equal(core(**batch.inputs).last_hidden_state, before)


@pytest.mark.parametrize("role", ["image", "pad"])
def test_a_prompt_from_elsewhere_stands_at_no_id_that_has_a_meaning(tiny_fast_vlm, tmp_path, role):
    base = load_base(str(tiny_fast_vlm), device="cpu")
    attachment = attach(base.host, recipe_of(PROMPT, tiny_fast_vlm, tmp_path).method)
    description = describe(attachment, "fast_vlm")
    detach(base.model)
    token_id = {"image": base.collator.image_id, "pad": base.model.generation_config.pad_token_id}[role]
    description.parts[0].options["placeholder_token_id"] = token_id
    with pytest.raises(
        ManifestError, match=f"placeholder_token_id must have no special meaning for this base, got {token_id}"
    ):
        expected_tensors(base.model, base.towers, description)
