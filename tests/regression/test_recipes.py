"""Recipes of a release train as they trained then: the same losses, scores and predictions."""

import json

import pytest

from tests.regression.nets import each
from tests.regression.outputs import train


@each("recipes")
def test_a_recipe_gives_what_it_gave(net, name, family, bases, tmp_path):
    was = json.loads((net / "recipes" / "outputs.json").read_text(encoding="utf-8"))[name]
    found = train(name, net=net, bases=bases[net], work=tmp_path / "runs")
    # Rounding of another CPU grows from step to step.
    assert found["losses"] == pytest.approx(was["losses"], rel=1e-3)
    assert (found["before"], found["after"]) == (was["before"], was["after"])
    assert (found["base"], found["adapter"]) == (was["base"], was["adapter"])
