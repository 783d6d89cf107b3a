"""The CPU of ``rounding.py`` gives equal bits for equal shapes, and for others almost the same."""

import subprocess
import sys
from pathlib import Path

CODE = """
import torch
import tests.rounding

x, layer = torch.randn(5, 8), torch.nn.Linear(8, 8)
whole = layer(x)
assert torch.equal(layer(x), whole)
assert not torch.equal(layer(x[:3]), whole[:3]) and torch.allclose(layer(x[:3]), whole[:3], rtol=1e-5)
"""


def test_bits_depend_on_the_shape():
    subprocess.run([sys.executable, "-c", CODE], cwd=Path(__file__).parents[1], check=True, timeout=300)
