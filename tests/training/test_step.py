"""The base's own outputs beside the adapter's: held against a second model that has no adapter."""

import json
from dataclasses import replace

import pytest
import torch

from finetune.assemble.batches import Batches
from finetune.assemble.loading import load_base
from finetune.errors import TrainingError
from finetune.methods.adapter import attach
from finetune.objectives.weighted import Weighted
from finetune.training.compiling import CompiledLayers
from finetune.training.gradient_checkpointing import recomputing
from finetune.training.step import Step
from finetune.training.trainable import set_train_mode
from tests.matrix import METHODS, extended, recipe_of, rows
from tests.objectives.toys import Nearness, divergence, spread, supervised

ADAPTED = ("lora", "dora", "lora-vision", "prompt_tuning", "norms", "lora+prompt+projector")


@pytest.fixture
def adapted(tmp_path):
    """Return a function: base folder, method -> (base, attachment, its objective by Nearness, a batch of its rows)."""

    def build(folder, method, *, dropout=0.0, fresh=False):
        sections = METHODS[method]
        if dropout:
            sections = {**sections, "lora_dropout": dropout}
        base = load_base(str(folder), device="cpu")
        torch.manual_seed(0)
        attachment = attach(base.host, recipe_of(sections, folder, tmp_path).method)
        if not fresh:
            spread(attachment)
        set_train_mode(base.model, attachment)
        task = base.task(base.default_task)
        objective = replace(base.objective(task, placeholders=attachment.placeholders), objective=Nearness())
        return base, attachment, objective, extended(attachment, base.collator.training_batch(pairs()))

    return build


def pairs():
    return [(row, True) for row in rows()]


def gradients(attachment):
    found = {name: parameter.grad.clone() for name, parameter in attachment.parameters.items()}
    for parameter in attachment.parameters.values():
        parameter.grad = None
    return found


@pytest.mark.parametrize("method", ["lora", "dora", "lora-vision", "norms"])
def test_an_adapter_without_effect_is_at_the_base(adapted, tiny_idefics3, method):
    base, _, objective, batch = adapted(tiny_idefics3, method, fresh=True)
    (term,) = objective.terms(base.model, batch).values()
    if method == "dora":
        # Its weights are divided by a norm and multiplied by the same one.
        assert abs(term.loss_sum.item()) < 1e-5
    else:
        assert term.loss_sum.item() == 0
    assert term.loss_sum.requires_grad


@pytest.mark.parametrize("method", ADAPTED)
def test_values_and_gradients_are_those_of_two_models(adapted, tiny_idefics3, method):
    base, attachment, objective, batch = adapted(tiny_idefics3, method)
    (term,) = objective.terms(base.model, batch).values()
    term.loss_sum.backward()
    found = gradients(attachment)
    other = load_base(str(tiny_idefics3), device="cpu")
    with torch.no_grad():
        plain = supervised(other.model, other.collator.training_batch(pairs()))
    wanted = divergence(supervised(base.model, batch), plain)
    wanted.backward()
    assert term.loss_sum.item() == pytest.approx(wanted.item(), rel=1e-5) and wanted > 1e-3
    for name, gradient in gradients(attachment).items():
        size = float(gradient.abs().max())
        assert size > 0 and torch.allclose(found[name], gradient, rtol=1e-4, atol=1e-5 * size), name


def test_every_family_gives_its_own_outputs(adapted, tiny_family):
    base, _, objective, batch = adapted(tiny_family, "lora+prompt")
    other = load_base(str(tiny_family), device="cpu")
    with torch.no_grad():
        plain = supervised(other.model, other.collator.training_batch(pairs()))
        found = objective.reference(batch)
        there = supervised(base.model, batch)
    assert found.shape == there.shape and not found.requires_grad
    assert torch.allclose(found, plain, atol=1e-6 * float(plain.abs().max()) + 1e-6)
    assert not torch.allclose(there, plain, atol=1e-3)


@pytest.mark.parametrize("method", ["lora", "lora+prompt+projector"])
def test_the_reference_leaves_everything_as_it_was(adapted, tiny_idefics3, method):
    base, attachment, objective, batch = adapted(tiny_idefics3, method, dropout=0.5 if method == "lora" else 0.0)
    training = {name for name, module in base.model.named_modules() if module.training}
    before = {name: tensor.clone() for name, tensor in base.model.state_dict().items()}
    random = torch.get_rng_state()
    first = objective.reference(batch)
    assert torch.equal(first, objective.reference(batch)), "dropout draws nothing"
    assert torch.equal(torch.get_rng_state(), random)
    assert {name for name, module in base.model.named_modules() if module.training} == training != set()
    after = base.model.state_dict()
    assert before.keys() == after.keys() and all(torch.equal(before[name], after[name]) for name in before)
    torch.manual_seed(3)
    with torch.no_grad():
        adapted_logits = supervised(base.model, batch)
    assert not torch.allclose(adapted_logits, first, atol=1e-3), "the adapter answers again"

    def broken(model, batch):
        raise RuntimeError("out of memory")

    with pytest.raises(RuntimeError, match="out of memory"):
        replace(objective.reference, outputs=broken)(batch)
    torch.manual_seed(3)
    with torch.no_grad():
        assert torch.equal(supervised(base.model, batch), adapted_logits)
    assert {name for name, module in base.model.named_modules() if module.training} == training
    assert all(parameter.requires_grad for parameter in attachment.parameters.values())


def test_recomputed_layers_give_the_same(adapted, tiny_idefics3):
    base, attachment, objective, batch = adapted(tiny_idefics3, "lora", dropout=0.3)
    found = []
    for enabled in (False, True):
        torch.manual_seed(5)
        with recomputing(base.model, enabled=enabled):
            (term,) = objective.terms(base.model, batch).values()
            term.loss_sum.backward()
        found.append((term.loss_sum.item(), gradients(attachment)))
    assert found[0][0] == found[1][0] > 0
    assert all(torch.equal(found[1][1][name], gradient) for name, gradient in found[0][1].items())


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")
def test_compiled_layers_give_the_same(adapted, tiny_idefics3, tmp_path, monkeypatch):
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "inductor"))
    monkeypatch.delenv("TORCHDYNAMO_DISABLE")  # which tests/conftest.py sets
    base, attachment, objective, batch = adapted(tiny_idefics3, "lora")
    found = []
    try:
        for paths in (None, base.towers["language"]):
            with CompiledLayers(base.model, paths):
                (term,) = objective.terms(base.model, batch).values()
                term.loss_sum.backward()
            found.append((term.loss_sum.item(), gradients(attachment)))
    finally:
        torch._dynamo.reset()
    assert found[1][0] == pytest.approx(found[0][0], rel=1e-4)
    for name, gradient in found[0][1].items():
        assert (found[1][1][name] - gradient).abs().max() < 1e-4 * gradient.abs().max(), name


def test_each_output_is_computed_once_and_the_base_is_not_asked_in_vain(adapted, tiny_fast_vlm):
    base, _, objective, batch = adapted(tiny_fast_vlm, "lora")
    calls = []
    base.model.register_forward_hook(lambda *_: calls.append(torch.is_grad_enabled()))
    own = base.objective(objective.task)
    own.terms(base.model, batch)
    assert calls == [True], "cross entropy costs one forward"
    both = Weighted({"cross_entropy": (1.0, own.objective), "nearness": (0.5, Nearness())})
    replace(objective, objective=both).terms(base.model, batch)
    assert calls == [True, False, True]
    with pytest.raises(TrainingError, match="must set needs_reference to True to use step.reference"):
        Nearness().terms(Step(base.model, batch, objective.task.outputs, None))


@pytest.mark.parametrize("method", ["lora", "prompt_tuning"])
def test_eight_rows_at_once_or_one_by_one_give_the_same_adapter(build, tiny_fast_vlm, method):
    results, losses = [], []
    for size, number in ((8, 1), (1, 8)):
        run = build(
            tiny_fast_vlm, max_steps=4, batch_size=size, gradient_accumulation_steps=number, learning_rate=1e-3,
            wrap=lambda objective: replace(objective, objective=mixed(objective)), method=METHODS[method],
        )  # fmt: skip
        run.trainer.collate = Batches(run.base.collator, run.attachment.placeholders).training_batch
        before = {n: p.clone() for n, p in run.base.model.named_parameters() if not p.requires_grad}
        run.trainer.train(run.examples)
        assert all(torch.equal(before[n], p) for n, p in run.base.model.named_parameters() if n in before)
        results.append(run.weights())
        losses.append([line["nearness.tokens"] for line in run.lines()])
        run.trainer.log.file.unlink()
    assert max((results[0][name] - results[1][name]).abs().max().item() for name in results[0]) < 1e-5
    assert losses[0] == pytest.approx(losses[1], rel=1e-4, abs=2e-6)
    assert losses[0][-1] > 0 and (method != "lora" or losses[0][0] == 0)


def mixed(objective):
    return Weighted({"cross_entropy": (1.0, objective.objective), "nearness": (0.25, Nearness())})


def test_several_objectives_are_logged_separately_and_one_is_not(build, tiny_fast_vlm):
    run = build(tiny_fast_vlm, max_steps=3, wrap=lambda objective: replace(objective, objective=mixed(objective)))
    run.trainer.train(run.examples)
    first, *_, last = run.lines()
    assert first["nearness.tokens"] == 0 and first["loss"] == first["cross_entropy.answer"]
    assert last["nearness.tokens"] > 0
    assert last["loss"] == pytest.approx(last["cross_entropy.answer"] + 0.25 * last["nearness.tokens"], abs=2e-6)
    alone = build(tiny_fast_vlm, max_steps=1)
    alone.trainer.log.file.unlink()
    alone.trainer.train(alone.examples)
    (line,) = alone.lines()
    assert set(line) == {
        "step", "loss", "learning_rate", "grad_norm", "epoch", "samples_per_s", "tokens_per_s"
    }  # fmt: skip
    assert line["loss"] == first["loss"]
    assert json.dumps(line)
