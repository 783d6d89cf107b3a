"""The language head at supervised places alone gives what all its logits give there."""

import pytest
import torch
from transformers import (
    CohereConfig,
    CohereForCausalLM,
    Gemma2Config,
    Gemma2ForCausalLM,
    GraniteConfig,
    GraniteForCausalLM,
)

from finetune.assemble.loading import load_base
from finetune.core.batch import Batch, Targets
from finetune.methods.adapter import attach
from finetune.tasks.supervised_logits import logits_at, why_all_logits
from tests.matrix import LORA, PROMPT, extended, recipe_of, rows

TINY = {
    "hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2,
    "num_key_value_heads": 2, "head_dim": 16, "vocab_size": 64,
}  # fmt: skip


def test_loss_and_gradients_are_those_of_all_logits(tiny_family, tmp_path):
    base = load_base(str(tiny_family), device="cpu")
    attachment = attach(base.host, recipe_of([LORA, PROMPT], tiny_family, tmp_path).method)
    for name, parameter in attachment.parameters.items():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    batch = extended(attachment, base.collator.training_batch(rows(3)))
    objective = base.objective(base.task(base.default_task))
    seen = []
    last = base.model.get_decoder().layers[-1]
    counted = [base.model.get_output_embeddings(), last.mlp.down_proj]
    handles = [m.register_forward_hook(lambda module, args, out: seen.append(out.shape[:-1].numel())) for m in counted]
    term = objective.terms(base.model, batch)["answer"]
    for handle in handles:
        handle.remove()
    term.loss_sum.backward()
    found = {name: p.grad.clone() for name, p in attachment.parameters.items()}
    for parameter in attachment.parameters.values():
        parameter.grad = None
    logits = base.model(**batch.inputs, use_cache=False).logits
    supervised = batch.labels[:, 1:] != -100
    loss = torch.nn.functional.cross_entropy(
        logits[:, :-1][supervised], batch.labels[:, 1:][supervised], reduction="sum"
    )
    loss.backward()
    assert seen == [int(supervised.sum())] * 2 == [term.num_items] * 2 and term.num_items < batch.labels.numel() / 2
    assert term.loss_sum.item() == pytest.approx(loss.item(), rel=1e-6)
    for name, parameter in attachment.parameters.items():
        scale = float(parameter.grad.abs().max())
        assert torch.allclose(found[name], parameter.grad, rtol=1e-4, atol=1e-6 * max(1.0, scale)), name


@pytest.mark.parametrize(
    "model",
    [
        lambda: Gemma2ForCausalLM(Gemma2Config(**TINY, final_logit_softcapping=0.05)),
        lambda: CohereForCausalLM(CohereConfig(**TINY, logit_scale=0.0625)),
        lambda: GraniteForCausalLM(GraniteConfig(**TINY, logits_scaling=8.0)),
    ],
    ids=["soft cap", "logit scale", "logits scaling"],
)
def test_what_comes_after_the_head_still_applies(model):
    model = model().eval()
    inputs = {"input_ids": torch.arange(12).reshape(2, 6), "attention_mask": torch.ones(2, 6, dtype=torch.long)}
    places = torch.tensor([1, 4, 9])
    with torch.no_grad():
        wanted = model(**inputs).logits
        plain = torch.nn.functional.linear(model.model(**inputs).last_hidden_state, model.lm_head.weight)
        assert torch.allclose(logits_at(model, inputs, places), wanted.flatten(0, 1)[places], atol=1e-7)
    assert not torch.allclose(wanted, plain, atol=1e-4)  # something does come after it


def test_a_model_without_a_head_of_its_own_gives_all_logits():
    model = Gemma2ForCausalLM(Gemma2Config(**TINY)).eval()
    inputs = {"input_ids": torch.arange(12).reshape(2, 6)}
    wanted = model(**inputs).logits.flatten(0, 1)[[3, 7]]
    assert why_all_logits(model) is None
    model.get_output_embeddings = lambda: None
    assert torch.allclose(logits_at(model, inputs, torch.tensor([3, 7])), wanted, atol=1e-6)
    assert "Gemma2ForCausalLM" in why_all_logits(model)


def test_the_first_token_of_a_row_is_predicted_by_nothing():
    labels = torch.tensor([[5, 6, -100], [-100, -100, 7]])
    targets = Targets.of(labels)
    assert targets.predictors.tolist() == [0, 4] and targets.tokens.tolist() == [6, 7]
    assert labels.tolist() == [[5, 6, -100], [-100, -100, 7]]
    assert Batch({"input_ids": labels}, [], labels).targets.tokens.tolist() == [6, 7]
