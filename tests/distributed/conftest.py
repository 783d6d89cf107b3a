"""Real processes over gloo: what runs.train puts together, on tiny bases, one launch for many scenarios."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[2]
WORKER = Path(__file__).with_name("worker.py")
TORCHRUN = ("-m", "torch.distributed.run")


def environment(**more):
    """Of a process on the CPU that takes one core."""
    path = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
    return {**os.environ, "PYTHONPATH": path, "ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1", **more}


def results(folder, count, process=0):
    """What one process left of each scenario."""
    return [torch.load(folder / f"{i}.{process}.pt", weights_only=True) for i in range(count)]


@pytest.fixture(scope="session")
def processes(tmp_path_factory):
    """Return a function: scenarios, number of processes -> what each scenario came to on each process."""

    def start(scenarios, number, timeout=400, **env):
        folder = tmp_path_factory.mktemp("processes")
        (folder / "scenarios.json").write_text(json.dumps(scenarios))
        launcher = (*TORCHRUN, "--standalone", "--nproc_per_node", str(number)) if number > 1 else ()
        out = subprocess.run(
            [sys.executable, *launcher, str(WORKER), str(folder / "scenarios.json"), str(folder)],
            env=environment(**env), cwd=ROOT, capture_output=True, text=True, timeout=timeout,
        )  # fmt: skip
        assert out.returncode == 0, out.stderr[-9000:]
        return [results(folder, len(scenarios), process) for process in range(number)]

    return start


@pytest.fixture(scope="session")
def bases(tmp_path_factory):
    """Return a function: family -> folder of a tiny base."""
    from tests.tiny import FAMILIES

    made = {}

    def base(family):
        if family not in made:
            made[family] = str(FAMILIES[family](tmp_path_factory.mktemp("bases") / family))
        return made[family]

    return base
