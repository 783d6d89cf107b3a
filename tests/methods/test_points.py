"""Points: a module's forward is replaced for the first adapter that reaches it, and is its own after the last."""

import inspect

import pytest
import torch
from torch import nn

from finetune.methods.modules import module_at
from finetune.methods.points import PLAIN, Answering, Points, reached


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
    return Answering(updates={names[k]: Add(model.get_submodule(names[k]), number) for k, number in numbers.items()})


def test_the_innermost_block_answers_and_an_adapter_leaves_what_it_does_not_change(model):
    points, one, two = Points(), adapter(model, first=1), adapter(model, first=10, second=100)
    x = torch.ones(1)
    for each in (one, two):
        points.add(each.updates)
    assert model(x) == 4 and points.answering is PLAIN
    with points.using(one):
        assert model(x) == 6
        with points.using(two):
            assert model(x) == 124 and points.answering is two
            with points.using(PLAIN):
                assert model(x) == 4
        assert model(x) == 6
        with pytest.raises(ZeroDivisionError), points.using(two):
            raise ZeroDivisionError
        assert model(x) == 6
    points.default = two
    assert model(x) == 124


def test_a_module_is_its_own_when_the_last_one_has_gone(model):
    points, one, two = Points(), adapter(model, first=1), adapter(model, first=10, second=100)
    own = [vars(module).copy() for module in model.modules()]
    points.add(one.updates)
    points.add(two.updates)
    assert reached(model) == ["0", "1.0"]
    assert inspect.signature(model[0].forward) == inspect.signature(Double().forward)
    assert model[0](torch.ones(1), times=5) == 5 and model[0].forward(torch.ones(1), times=5) == 5
    points.remove(two.updates)
    assert reached(model) == ["0"]
    with points.using(one):
        assert model(torch.ones(1)) == 6
    points.remove(one.updates)
    assert reached(model) == [] and [vars(module) for module in model.modules()] == own


def test_what_another_library_put_in_the_place_of_forward_stays(model):
    points, one = Points(), adapter(model, first=1)
    module = model[0]
    module.forward = lambda x: x * 3  # as accelerate's hooks are
    before = vars(module)["forward"]
    points.add(one.updates)
    with points.using(one):
        assert model(torch.ones(1)) == 8
    points.remove(one.updates)
    assert vars(module)["forward"] is before
    points.add(one.updates)
    under = module.forward
    module.forward = lambda x: under(x) * 10
    points.remove(one.updates)
    assert module(torch.ones(1)) == 30, "what was put over it still stands"
    points.add(one.updates)
    with points.using(one):
        assert module(torch.ones(1)) == 40, "added once, not twice"


def test_a_name_that_leads_nowhere_is_a_key_error(model):
    model.register_module("left_out", None)
    assert module_at(model, "") is model and module_at(model, "1.0") is model[1][0]
    for name in ("2", "0.forward", "left_out", "left_out.weight", "1..0", ".", "weight"):
        with pytest.raises(KeyError):
            module_at(model, name)
