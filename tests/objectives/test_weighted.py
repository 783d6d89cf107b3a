"""Several objectives as one: names, counts and weights."""

from types import SimpleNamespace

import torch

from finetune.interfaces import LossSum
from finetune.objectives.weighted import Weighted


class Toy:
    def __init__(self, value, count, *, needs_reference=False):
        self.value, self.count, self.needs_reference = value, count, needs_reference

    def count_items(self, batch):
        return {"things": self.count}

    def terms(self, step):
        return {"things": LossSum(self.value * step.forward(), self.count)}


def test_each_term_keeps_its_own_sum_and_count_and_has_the_weight_beside_it():
    weight = torch.tensor(3.0, requires_grad=True)
    step = SimpleNamespace(forward=lambda: weight, reference=lambda: 1 / 0)
    both = Weighted({"first": (1.0, Toy(2.0, 4)), "second": (0.5, Toy(10.0, 5))})
    assert both.count_items(None) == {"first.things": 4, "second.things": 5}
    terms = both.terms(step)
    assert {name: (term.loss_sum.item(), term.num_items, term.weight) for name, term in terms.items()} == {
        "first.things": (6.0, 4, 1.0),
        "second.things": (30.0, 5, 0.5),
    }
    # 1 x 6 / 4 + 0.5 x 30 / 5, of which the derivative is 2 / 4 + 0.5 x 10 / 5.
    total = sum(term.weight * term.loss_sum / term.num_items for term in terms.values())
    total.backward()
    assert total.item() == 4.5 and weight.grad.item() == 1.5


def test_the_base_is_asked_where_one_of_them_asks():
    assert not Weighted({"a": (1.0, Toy(1, 1)), "b": (1.0, Toy(1, 1))}).needs_reference
    assert Weighted({"a": (1.0, Toy(1, 1)), "b": (1.0, Toy(1, 1, needs_reference=True))}).needs_reference
