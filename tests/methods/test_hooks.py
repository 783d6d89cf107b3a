"""AdapterHooks: a module's forward is replaced for the first adapter that reaches it, and is its own after the last."""

import inspect

import pytest
import torch
from torch import nn

from finetune.methods.hooks import PLAIN, ActiveAdapter, AdapterHooks, reached
from finetune.methods.modules import module_at


class Add:
    """An update that adds a number to what the module gives."""

    num_bytes = 0

    def __init__(self, module, number):
        self.module, self.number = module, number

    def __call__(self, inner, *args, **kwargs):
        return inner(*args, **kwargs) + self.number


class Double(nn.Module):
    def forward(self, x, *, times=2):
        return x * times


@pytest.fixture
def model():
    return nn.Sequential(Double(), nn.Sequential(Double()))


def adapter(model, **numbers):
    names = {"first": "0", "second": "1.0"}
    return ActiveAdapter(
        updates={names[k]: Add(model.get_submodule(names[k]), number) for k, number in numbers.items()}
    )


def test_the_innermost_block_answers_and_an_adapter_leaves_what_it_does_not_change(model):
    hooks, one, two = AdapterHooks(), adapter(model, first=1), adapter(model, first=10, second=100)
    x = torch.ones(1)
    for each in (one, two):
        hooks.add(each.updates)
    assert model(x) == 4 and hooks.active is PLAIN
    with hooks.using(one):
        assert model(x) == 6
        with hooks.using(two):
            assert model(x) == 124 and hooks.active is two
            with hooks.using(PLAIN):
                assert model(x) == 4
        assert model(x) == 6
        with pytest.raises(ZeroDivisionError), hooks.using(two):
            raise ZeroDivisionError
        assert model(x) == 6
    hooks.default = two
    assert model(x) == 124


def test_a_module_is_its_own_when_the_last_one_has_gone(model):
    hooks, one, two = AdapterHooks(), adapter(model, first=1), adapter(model, first=10, second=100)
    own = [vars(module).copy() for module in model.modules()]
    hooks.add(one.updates)
    hooks.add(two.updates)
    assert reached(model) == ["0", "1.0"]
    assert inspect.signature(model[0].forward) == inspect.signature(Double().forward)
    assert model[0](torch.ones(1), times=5) == 5 and model[0].forward(torch.ones(1), times=5) == 5
    hooks.remove(two.updates)
    assert reached(model) == ["0"]
    with hooks.using(one):
        assert model(torch.ones(1)) == 6
    hooks.remove(one.updates)
    assert reached(model) == [] and [vars(module) for module in model.modules()] == own


def test_what_another_library_put_in_the_place_of_forward_stays(model):
    hooks, one = AdapterHooks(), adapter(model, first=1)
    module = model[0]
    module.forward = lambda x: x * 3  # as accelerate's hooks are
    before = vars(module)["forward"]
    hooks.add(one.updates)
    with hooks.using(one):
        assert model(torch.ones(1)) == 8
    hooks.remove(one.updates)
    assert vars(module)["forward"] is before
    hooks.add(one.updates)
    under = module.forward
    module.forward = lambda x: under(x) * 10
    hooks.remove(one.updates)
    assert module(torch.ones(1)) == 30, "what was put over it still stands"
    hooks.add(one.updates)
    with hooks.using(one):
        assert module(torch.ones(1)) == 40, "added once, not twice"


def test_a_name_that_leads_nowhere_is_a_key_error(model):
    model.register_module("left_out", None)
    assert module_at(model, "") is model and module_at(model, "1.0") is model[1][0]
    for name in ("2", "0.forward", "left_out", "left_out.weight", "1..0", ".", "weight"):
        with pytest.raises(KeyError):
            module_at(model, name)
