"""Optimizers: what they compute, at which rates, and that going on from a checkpoint is exact."""

from types import SimpleNamespace

import pytest
import torch

from finetune.errors import TrainingError
from finetune.recipe import TrainSection
from finetune.training.optimizer import load_optimizer, make_optimizer, optimizer_tensors, set_learning_rate

SIZES = {"small": (7, 5), "large": (64, 128)}  # bitsandbytes keeps tensors under 4096 values in 32 bit


def attachment(ratios=None):
    torch.manual_seed(0)
    parameters = {name: torch.nn.Parameter(torch.randn(size)) for name, size in SIZES.items()}
    return SimpleNamespace(parameters=parameters, learning_rates=ratios or {})


def make(optim, **options):
    it = attachment(options.pop("ratios", None))
    section = TrainSection(max_steps=1, optim=optim, learning_rate=0.01, **options)
    return it.parameters, make_optimizer(it, section)


def steps(parameters, optimizer, numbers, rate=0.01):
    for number in numbers:
        for parameter in parameters.values():
            generator = torch.Generator().manual_seed(number)
            parameter.grad = torch.randn(parameter.shape, generator=generator)
        set_learning_rate(optimizer, rate / (number + 1))
        optimizer.step()


@pytest.mark.parametrize(("optim", "tolerance"), [("adamw_torch", 1e-6), ("adamw_8bit", 0.005)])
def test_each_computes_adamw(optim, tolerance):
    """Against torch's plain loop over tensors; 8 bit are within half of the first step of it."""
    parameters, optimizer = make(optim, weight_decay=0.1)
    steps(parameters, optimizer, range(20))
    expected = attachment().parameters
    plain = torch.optim.AdamW(
        [{"params": list(expected.values()), "lr_ratio": 1.0}], weight_decay=0.1, foreach=False, fused=False
    )
    steps(expected, plain, range(20))
    for name, parameter in parameters.items():
        assert (parameter - expected[name]).abs().max() < tolerance
        assert (parameter - attachment().parameters[name]).abs().max() > 0.03


def test_torchs_is_fused_and_the_other_is_in_8_bit():
    parameters, optimizer = make("adamw_torch")
    assert optimizer.param_groups[0]["fused"]
    parameters, optimizer = make("adamw_8bit")
    steps(parameters, optimizer, range(1))
    assert optimizer.state[parameters["large"]]["state1"].dtype == torch.uint8


@pytest.mark.parametrize("optim", ["adamw_torch", "adamw_8bit"])
def test_each_goes_on_exactly(optim):
    ratios = {"large": 4.0}
    parameters, optimizer = make(optim, ratios=ratios)
    steps(parameters, optimizer, range(3))
    kept = {
        name: {s: t.clone() for s, t in slots.items()}
        for name, slots in optimizer_tensors(optimizer, parameters).items()
    }
    assert all(isinstance(t, torch.Tensor) for slots in kept.values() for t in slots.values())
    weights = {name: p.detach().clone() for name, p in parameters.items()}
    steps(parameters, optimizer, range(3, 6))

    again, second = make(optim, ratios=ratios)
    steps(again, second, range(1))  # what is there is replaced
    with torch.no_grad():
        for name, parameter in again.items():
            parameter.copy_(weights[name])
    load_optimizer(second, again, kept)
    kept["large"].clear()
    steps(again, second, range(3, 6))
    for name, parameter in parameters.items():
        assert torch.equal(parameter, again[name])
        mine, theirs = optimizer.state[parameter], second.state[again[name]]
        assert mine.keys() == theirs.keys()
        assert all(type(mine[slot]) is type(theirs[slot]) for slot in mine)
    assert [group["lr"] for group in second.param_groups] == [0.01 / 6, 0.04 / 6]


def test_an_optimizer_that_the_device_has_not_is_refused():
    it = SimpleNamespace(parameters={"x": torch.nn.Parameter(torch.empty(3, device="meta"))}, learning_rates={})
    with pytest.raises(TrainingError, match="train.optim adamw_8bit runs only on cpu, cuda, xpu, got meta. Set"):
        make_optimizer(it, TrainSection(max_steps=1, optim="adamw_8bit"))
    assert not make_optimizer(it, TrainSection(max_steps=1)).param_groups[0]["fused"]
