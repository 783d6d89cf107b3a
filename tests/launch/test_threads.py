"""Threads: set before torch is imported, waiting without spinning, and a line when other processes use the cores."""

import os
import subprocess
import sys

import pytest

from finetune.launch import threads
from finetune.launch.threads import WAITING, BusyCores, _Use, set_threads, waiting_env


def test_waiting_threads_soon_sleep_unless_the_user_chose():
    assert waiting_env({"PATH": "/bin"}) == {"GOMP_SPINCOUNT": "3000", "KMP_BLOCKTIME": "1"}
    for name in ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "KMP_BLOCKTIME"):
        assert waiting_env({name: "1"}) == {}


@pytest.mark.parametrize("env", [{}, {"OMP_NUM_THREADS": "2"}])
def test_torch_gets_the_number_of_the_recipe_and_its_openmp_does_not_spin(env):
    code = """
import sys
from finetune.launch.threads import set_threads
assert "torch" not in sys.modules
set_threads(1)
import torch
print(torch.get_num_threads())
torch.ones(1000, 1000).sum()
"""
    env = {k: v for k, v in os.environ.items() if not k.startswith(("OMP_", "GOMP_"))} | env
    env |= {"OMP_DISPLAY_ENV": "verbose", "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["1"]
    assert "GOMP_SPINCOUNT = '3000'" in done.stderr  # what torch's own OpenMP read


def test_where_torch_is_imported_it_is_told_itself(monkeypatch):
    import torch

    monkeypatch.setenv("OMP_NUM_THREADS", "7")
    told = []
    monkeypatch.setattr(torch, "set_num_threads", told.append)
    set_threads("auto")
    assert told == [] and os.environ["OMP_NUM_THREADS"] == "7"
    set_threads(2)
    assert told == [2] and os.environ["OMP_NUM_THREADS"] == "2"


@pytest.fixture
def windows(monkeypatch):
    """Return a function: threads, cores, uses (wall, own, all) one after the other -> a measurement that began."""

    def begin(num_threads, cores, uses):
        left = iter([_Use(0.0, 0.0, 0.0), *(use and _Use(*use) for use in uses)])
        monkeypatch.setattr(threads, "_use", lambda: next(left))
        monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(cores)), raising=False)
        return BusyCores(num_threads)

    return begin


def test_one_line_says_that_the_cores_are_busy(windows, monkeypatch):
    monkeypatch.setenv("OMP_WAIT_POLICY", "active")
    busy = windows(2, 2, [(10.0, 8.0, 20.0), (20.0, 16.0, 40.0)])
    assert busy.explain() == (
        "the cores are busy: other processes use 1.2 of 2, and this run with 2 threads got 0.8. Its threads spin while "
        "they wait: set OMP_WAIT_POLICY=PASSIVE, or train.num_threads: 1."
    )
    assert busy.explain() is None, "it is said once"


@pytest.mark.parametrize(
    ("num_threads", "cores", "use"),
    [
        (2, 2, (10.0, 19.0, 20.0)),  # all of it is this run
        (2, 8, (10.0, 19.0, 60.0)),  # there is room for both
        (2, 2, (1.0, 0.1, 2.0)),  # too short to tell
        (2, 2, None),  # a system that does not tell
    ],
)
def test_cores_that_are_not_busy_are_not_mentioned(windows, num_threads, cores, use):
    assert windows(num_threads, cores, [use]).explain() is None


@pytest.mark.parametrize(
    ("num_threads", "env", "how"),
    [
        (1, {"OMP_WAIT_POLICY": "ACTIVE"}, "1 thread"),
        (2, {"OMP_WAIT_POLICY": "passive"}, "2 threads"),
        (2, waiting_env({}), "2 threads"),
    ],
)
def test_threads_that_do_not_spin_get_no_advice(windows, monkeypatch, num_threads, env, how):
    for name in WAITING:
        monkeypatch.delenv(name, raising=False)
    for name, value in env.items():
        monkeypatch.setenv(name, value)
    found = windows(num_threads, 2, [(10.0, 7.0, 20.0 + 7.0)]).explain()
    assert found == f"the cores are busy: other processes use 2.0 of 2, and this run with {how} got 0.7."


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc/stat")
def test_the_use_of_the_cores_is_read():
    before = threads._use()
    sum(range(3_000_000))
    after = threads._use()
    assert after.wall > before.wall and after.own > before.own and after.all >= before.all > 0
