"""The comparison of two checkouts finds them equal where they are, and finds a change where there is one."""

import shutil

import numpy as np

from tests.regression.compare import ROOT, differences, main

# As a change anywhere in the package would: the last bits of a product move.
TAMPERED = """
import torch as _torch
_linear = _torch.nn.functional.linear
_torch.nn.functional.linear = lambda *args, **options: _linear(*args, **options) * (1 + 1e-6)
"""
ONE = "qwen2-5-vl-lora"


def test_a_checkout_equals_itself(capsys):
    assert main([str(ROOT), "--only", ONE]) == 0
    assert capsys.readouterr().out == "0 of 2 outputs differ\n"


def test_a_changed_checkout_is_found_and_what_differs_is_named(tmp_path, capsys):
    shutil.copytree(ROOT / "finetune", tmp_path / "finetune", ignore=shutil.ignore_patterns("__pycache__"))
    with (tmp_path / "finetune" / "__init__.py").open("a", encoding="utf-8") as file:
        file.write(TAMPERED)
    assert main([str(tmp_path), "--only", ONE]) == 1
    lines = capsys.readouterr().out.splitlines()
    assert [line.partition(" values differ")[0].rpartition(": ")[0] for line in lines] == [
        f"{ONE}: adapter", f"{ONE}: base", ""
    ]  # fmt: skip
    assert lines[-1] == "2 of 2 outputs differ"


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
