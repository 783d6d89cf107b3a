"""A sweep for the price of a run: six runs over one filled store against one run without a store.

python -m benchmarks.sweep --json sweep.json      takes about 10 minutes on two idle CPU cores
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import torch
import yaml
from transformers import AutoProcessor

from benchmarks.contestants import Job
from benchmarks.contestants.parts import raw_recipe
from benchmarks.measure import BenchmarkError
from benchmarks.models import SETUPS
from benchmarks.results import EPOCHS, machine
from benchmarks.rows import write_rows

GRID = ("method.r=4,8", "train.learning_rate=3e-4,1e-3,3e-3")
WANTED = 2.5  # times the cost of one run, at most


@dataclass(frozen=True, kw_only=True)
class Cost:
    """The cost of a command, with its child processes.

    Attributes:
        seconds: the wall time.
        cpu_seconds: the user and system time.
    """

    seconds: float
    cpu_seconds: float


def main(arguments: list[str] | None = None) -> int:
    """Measure, print both costs and write the figure."""
    options = _parse(arguments)
    costs: dict[str, list[Cost]] = {"run": [], "sweep": []}
    with tempfile.TemporaryDirectory(prefix="benchmark-") as name:
        folder = Path(name)
        configs = _write_configs(folder, options.model, num_rows=options.rows)
        for number in range(options.rounds):
            for what, found in costs.items():
                found.append(_run(what, configs[what], folder / f"{what}-{number}"))
                print(f"{what}: {found[-1].seconds:.1f} s, {found[-1].cpu_seconds:.1f} s of CPU", flush=True)
    run, sweep = (statistics.median(cost.seconds for cost in costs[what]) for what in ("run", "sweep"))
    print(f"sweep_vs_one_run {sweep / run:.2f}, wanted at most {WANTED}: {'yes' if sweep / run <= WANTED else 'no'}")
    if options.json:
        details = {
            "machine": machine(torch.device("cpu")),
            "grid": GRID,
            "model": SETUPS[options.model].title,
            "rows": options.rows,
            "epochs": EPOCHS,
            "costs": {what: [vars(cost) for cost in found] for what, found in costs.items()},
        }
        text = json.dumps({"sweep_vs_one_run": sweep / run, "details": details}, indent=1)
        options.json.write_text(text + "\n", encoding="utf-8")
    return 0


def _write_configs(folder: Path, model: str, *, num_rows: int) -> dict[str, Path]:
    """Write base, rows and the two recipes, which differ in the store alone."""
    setup = SETUPS[model]
    base = setup.save(folder / "base", torch.float32)
    tokenizer = AutoProcessor.from_pretrained(base).tokenizer
    job = Job(
        base=base,
        rows=write_rows(folder / "rows", setup, tokenizer, num_rows=num_rows),
        scratch=Path("runs"),  # of the folder that the command runs in
        order=tuple(range(num_rows)) * EPOCHS,
        batch_size=setup.batch_size,
        device="cpu",
        dtype="float32",
        num_workers=0,
        launched=True,
    )
    configs = {}
    for what in ("run", "sweep"):
        configs[what] = folder / f"{what}.yaml"
        configs[what].write_text(yaml.safe_dump(raw_recipe(job, store=what == "sweep")), encoding="utf-8")
    return configs


def _run(what: str, config: Path, folder: Path) -> Cost:
    """Run a command in a folder of its own, with a cache of its own, so that it finds nothing ready."""
    folder.mkdir()
    arguments = ["launch", str(config)] if what == "run" else ["cli", "sweep", str(config), *GRID]
    command = [sys.executable, "-m", *(f"finetune.{arguments[0]}", *arguments[1:])]
    places = {"FINETUNE_CACHE": str(folder / "cache"), "FINETUNE_REGISTRY": str(folder / "registry")}
    paths = os.pathsep.join([str(Path(__file__).parents[1]), *filter(None, [os.environ.get("PYTHONPATH")])])
    before, begun = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
    done = subprocess.run(
        command,
        cwd=folder,
        env=os.environ | places | {"PYTHONPATH": paths, "ACCELERATE_USE_CPU": "true", "NPROC": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
    )
    seconds, after = time.perf_counter() - begun, resource.getrusage(resource.RUSAGE_CHILDREN)
    if done.returncode:
        raise BenchmarkError(f"{' '.join(command)} ended with {done.returncode}:\n{done.stdout[-3000:]}")
    used = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return Cost(seconds=seconds, cpu_seconds=used)


def _parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.sweep", description=__doc__.splitlines()[0])
    parser.add_argument("--json", type=Path, metavar="FILE", help="file to write the figure to")
    parser.add_argument("--model", choices=SETUPS, default="b", help="base (b)")
    parser.add_argument("--rows", type=int, default=32, help="rows of an epoch (32)")
    parser.add_argument("--rounds", type=int, default=1, help="rounds of both; the median counts (1)")
    return parser.parse_args(arguments)


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))  # so that nothing is left behind
    try:
        sys.exit(main())
    except BenchmarkError as error:
        sys.exit(f"error: {error}")
