"""A test draws the same values alone, among others and in another order, and with any first import of torch."""

import json
import os
import random
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

ROOT = Path(__file__).parents[1]
CONFTEST = "from tests.seeding import pytest_fixture_setup, pytest_make_collect_report, pytest_runtest_setup"
# Stands for torch, which takes seconds to load; by default its generator differs in every process, as no test may see.
TORCH = """
import random
_generator = random.Random()
manual_seed, rand = _generator.seed, _generator.random
get_rng_state, set_rng_state = _generator.getstate, _generator.setstate
"""
COMMON = """
import json, os, random
import numpy as np
import pytest

def draw():
    import torch
    return [random.random(), np.random.rand(), torch.rand()]

def note(name, *values):
    with open(os.environ["NOTES"], "a") as file:
        file.write(json.dumps([name, values]) + chr(10))

@pytest.fixture(scope="session")
def shared():
    return draw()

@pytest.fixture
def own():
    return draw()
"""
FIRST = """
from common import *

def test_no_torch():
    note("no torch", random.random(), np.random.rand())

def test_with_shared(shared, own):
    note("first", shared, own, draw())
"""
SECOND = """
from common import *
AT_IMPORT = draw()

def test_late(request):
    before = draw()
    note("late", AT_IMPORT, before, request.getfixturevalue("shared"), draw())

def test_with_shared(shared, own):
    note("second", AT_IMPORT, shared, own, draw())
"""


@pytest.fixture
def drawn(tmp_path):
    """Return a function: runs some tests in a process of its own and returns what each of them drew."""
    files = {"conftest": CONFTEST, "torch": TORCH, "common": COMMON, "test_first": FIRST, "test_second": SECOND}
    for name, text in files.items():
        (tmp_path / f"{name}.py").write_text(text, encoding="utf-8")

    def run(*tests):
        notes = tmp_path / "notes.jsonl"
        notes.unlink(missing_ok=True)
        done = subprocess.run(
            [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--rootdir", str(tmp_path), *tests],
            cwd=tmp_path,
            env={
                **os.environ,
                "PYTHONPATH": f"{tmp_path}{os.pathsep}{ROOT}",
                "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1",  # they take longer to load than all else here
                "NOTES": str(notes),
            },
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, done.stdout + done.stderr
        return dict(json.loads(line) for line in notes.read_text().splitlines())

    return run


def test_every_order_draws_the_same(drawn):
    whole = drawn("test_first.py", "test_second.py")
    assert len(whole) == 4
    backwards = drawn("test_second.py", "test_first.py")
    assert backwards == whole
    for test, name in (("test_first.py::test_with_shared", "first"), ("test_second.py::test_late", "late")):
        assert drawn(test) == {name: whole[name]}


def test_a_test_that_loads_torch_draws_as_one_that_finds_it_loaded():
    import torch

    assert torch.initial_seed() == 0
    assert random.random() == random.Random(0).random()
    assert np.random.rand() == np.random.RandomState(0).rand()
    found = torch.rand(3)
    assert torch.equal(found, torch.rand(3, generator=torch.Generator().manual_seed(0)))
