"""Compiled layers: the same gradients, the same names, and gone when training ends."""

import json

import pytest
import torch
import torch._dynamo

from finetune.errors import TrainingError
from finetune.runs.train import train
from finetune.training.compiling import CompiledLayers
from tests.tiny import save_idefics3

# Dynamo looks at the gradient of what is no leaf.
pytestmark = pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")


@pytest.fixture(autouse=True)
def nothing_compiled(tmp_path, monkeypatch):
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "inductor"))
    monkeypatch.delenv("TORCHDYNAMO_DISABLE")  # which tests/conftest.py sets
    yield
    torch._dynamo.reset()


def gradients(run):
    """Of two micro-batches of different widths."""
    objective, model = run.trainer.objective, run.base.model
    for rows in (run.examples[:3], run.examples[3:8]):
        batch = run.base.collator.training_batch(rows)
        objective.terms(model, batch)["answer"].loss_sum.backward()
    found = {name: p.grad.clone() for name, p in run.attachment.parameters.items()}
    for parameter in run.attachment.parameters.values():
        parameter.grad = None
    return found


@pytest.mark.slow
def test_the_gradients_are_the_same_and_nothing_is_left_behind(build, tmp_path):
    run = build(save_idefics3(tmp_path / "base"), learning_rate=0.01)
    run.trainer.train(run.examples)  # B is no longer zero
    model, names = run.base.model, list(run.base.model.state_dict())
    expected = gradients(run)
    layers = CompiledLayers(model, run.base.towers["language"])
    assert len(layers.layers) == model.config.text_config.num_hidden_layers
    with layers:
        torch._dynamo.utils.counters.clear()
        found = gradients(run)
        assert torch._dynamo.utils.counters["stats"]["unique_graphs"] > 0
        assert list(model.state_dict()) == names
        before = dict(torch._dynamo.utils.counters["stats"])
        with layers.paused():
            run.base.model.generate(**run.base.collator.prompt_batch(run.examples[:2]).inputs, max_new_tokens=2)
        assert dict(torch._dynamo.utils.counters["stats"]) == before
    assert not any(module._compiled_call_impl for module in model.modules())
    for name, gradient in expected.items():
        assert (found[name] - gradient).abs().max() < 1e-5 * gradient.abs().max()


@pytest.mark.slow
def test_a_whole_run_is_the_same(make_recipe, tmp_path):
    base, losses = save_idefics3(tmp_path / "base"), []
    for on in (False, True):
        recipe = make_recipe(base, name=f"compiled-{on}".lower(), train={"torch_compile": on, "logging_steps": 1})
        train(recipe)
        lines = [json.loads(line) for line in (recipe.run_folder / "log.jsonl").read_text().splitlines()]
        losses.append([line["loss"] for line in lines if "loss" in line])
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)


def test_what_cannot_be_compiled_is_refused(monkeypatch):
    model = torch.nn.Sequential(torch.nn.ModuleList([torch.nn.Linear(2, 2), torch.nn.Linear(2, 2)]))
    with pytest.raises(TrainingError, match="train.torch_compile needs a base with repeated layers"):
        CompiledLayers(torch.nn.ModuleDict({"a": torch.nn.Linear(2, 2)}), ["a"])
    with pytest.raises(TrainingError, match="train.torch_compile needs a base with repeated layers"):
        CompiledLayers(model, [])
    monkeypatch.setattr(torch.nn.Module, "compile", lambda self: None)
    with pytest.raises(TrainingError, match="torch cannot compile the layers on this machine: no compiler. Set it"):
        with CompiledLayers(model, ["0"]):
            raise torch._dynamo.exc.InternalTorchDynamoError("no compiler\nand a trace")


def test_nothing_is_compiled_where_nothing_is_asked_for(tiny_fast_vlm, build):
    run = build(tiny_fast_vlm)
    with CompiledLayers(run.base.model, None) as layers, layers.paused():
        assert not any(module._compiled_call_impl for module in run.base.model.modules())
