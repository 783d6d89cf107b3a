"""Every test draws the same values in every run: alone or among others, in any order, with any first import of torch.

``conftest.py`` imports the hooks from here. Seeded are ``random``, numpy's global generator and torch:
before a test module is imported, before a fixture that outlives a test is set up, and before each test.
"""

import contextlib
import importlib.util
import random
import sys

import numpy as np
import pytest


def seed() -> None:
    """Seed all generators that code can draw from without naming one."""
    random.seed(0)
    np.random.seed(0)
    if torch := sys.modules.get("torch"):
        torch.manual_seed(0)


@contextlib.contextmanager
def fresh_generators():
    """Draw inside from fresh generators, and leave them after as they were before."""
    kept, kept_numpy = random.getstate(), np.random.get_state()
    torch = sys.modules.get("torch")
    kept_torch = torch.get_rng_state() if torch else None
    seed()
    try:
        yield
    finally:
        random.setstate(kept)
        np.random.set_state(kept_numpy)
        if kept_torch is not None:
            torch.set_rng_state(kept_torch)
        elif torch := sys.modules.get("torch"):  # loaded meanwhile
            torch.manual_seed(0)


class SeedTorch:
    """Seeds torch as soon as it is loaded, also in the middle of a test: many tests need none, so it is not loaded."""

    def find_spec(self, name, path=None, target=None):
        """Return the spec of torch, whose loader seeds it; None for anything else."""
        if name != "torch":
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(name)
        if spec is not None:
            execute = spec.loader.exec_module

            def seeding(module):
                execute(module)
                module.manual_seed(0)

            spec.loader.exec_module = seeding
        return spec


if "torch" not in sys.modules:
    sys.meta_path.insert(0, SeedTorch())


@pytest.hookimpl(wrapper=True)
def pytest_make_collect_report(collector):
    """Seed what a test module draws while it is imported."""
    if isinstance(collector, pytest.Module):
        with fresh_generators():
            return (yield)
    return (yield)


@pytest.hookimpl(wrapper=True)
def pytest_fixture_setup(fixturedef, request):
    """Seed a fixture that several tests share: which of them sets it up must change neither it nor that test."""
    if fixturedef.scope != "function":
        with fresh_generators():
            return (yield)
    return (yield)


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item):
    """Seed each test, before any fixture of its own."""
    seed()
