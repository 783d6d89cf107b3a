"""The comparison of two checkouts finds them equal where they are, and finds a change where there is one."""

import shutil
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

from tests.regression import compare
from tests.regression.bases import build_base
from tests.regression.compare import ROOT, compute, differences
from tests.regression.nets import NETS

# As a change anywhere in the package would: the last bits move. In norms, since products run other code on other CPUs.
TAMPERED = """
import torch as _torch
_rsqrt = _torch.rsqrt
_torch.rsqrt = lambda *args, **options: _rsqrt(*args, **options) * (1 + 1e-6)
"""
ONE = "qwen2-5-vl-lora"


@pytest.fixture
def tampered(tmp_path):
    """A checkout whose norms are off by a millionth."""
    ignored = shutil.ignore_patterns("__pycache__")
    shutil.copytree(ROOT / "finetune", tmp_path / "tampered" / "finetune", ignore=ignored)
    with (tmp_path / "tampered" / "finetune" / "__init__.py").open("a", encoding="utf-8") as file:
        file.write(TAMPERED)
    return tmp_path / "tampered"


@pytest.mark.slow
def test_a_checkout_equals_itself_and_a_changed_one_is_found(tampered, tmp_path):
    build_base(NETS[0] / "bases" / "qwen2_5_vl", tmp_path / "bases" / "qwen2_5_vl")

    def run(number, checkout):
        return compute(checkout, NETS[0], tmp_path / str(number), only=[ONE], recipes=False)

    with ThreadPoolExecutor() as pool:
        one, again, other = pool.map(run, range(3), (ROOT, ROOT, tampered))
    assert one.keys() == {f"{ONE}: base", f"{ONE}: adapter"} and differences(one, again) == []
    found = differences(one, other)
    assert [line.partition(" values differ, by up to ")[0].rpartition(": ")[0] for line in found] == sorted(one)


def test_the_command_reports_what_differs_and_fails(monkeypatch, tmp_path, capsys):
    outputs = {tmp_path / "old": 1.0, tmp_path / "new": 1.0}
    monkeypatch.setattr(compare, "compute", lambda checkout, *args, **more: {"x: base": np.array([outputs[checkout]])})
    command = [str(tmp_path / "old"), "--new", str(tmp_path / "new")]
    assert compare.main(command) == 0 and capsys.readouterr().out == "0 of 1 outputs differ\n"
    outputs[tmp_path / "new"] = 1.5
    assert compare.main(command) == 1
    report = "x: base: 1 of 1 values differ, by up to 0.5, the largest is 1\n1 of 1 outputs differ\n"
    assert capsys.readouterr().out == report


def test_one_bit_is_a_difference():
    old = {"a: base": np.ones((2, 3), np.float32), "recipe x: adapter": np.array(["red", "blue"]), "gone": np.zeros(1)}
    new = {"a: base": old["a: base"].copy(), "recipe x: adapter": np.array(["red", "green"])}
    new["a: base"][1, 1] = np.nextafter(np.float32(1), np.float32(2))
    assert differences(old, old) == []
    assert differences(old, new) == [
        "gone: only the old checkout has it",
        "a: base: 1 of 6 values differ, by up to 1.19e-07, the largest is 1",
        "recipe x: adapter: ['red', 'blue'] became ['red', 'green']",
    ]
    assert differences({"a": -np.zeros(1)}, {"a": np.zeros(1)}), "the sign of zero is a bit too"
