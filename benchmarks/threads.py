"""What threads cost beside other processes: training of the pocket model, with and without processes on every core.

python -m benchmarks.threads --json FILE      about three minutes on two CPU cores
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
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from benchmarks.contestants import Job
from benchmarks.models import SETUPS
from benchmarks.results import cpu_name
from benchmarks.rows import write_rows
from finetune.launch.hardware import num_cores
from finetune.launch.threads import WAITING, waiting_env

if TYPE_CHECKING:
    from collections.abc import Iterator

POLICIES = {"openmp": {}, "passive": {"OMP_WAIT_POLICY": "PASSIVE"}, "ours": waiting_env({})}
BURN = "while True: pass"


def main(arguments: list[str] | None = None) -> int:
    """Measure, print the figures and write them."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.threads", description=__doc__.splitlines()[0])
    parser.add_argument("--json", type=Path, metavar="FILE", help="file to write the figures to")
    parser.add_argument("--rounds", type=int, default=3, help="alternating rounds, of which medians count (3)")
    parser.add_argument("--steps", type=int, default=20, help="optimizer steps of a round (20)")
    parser.add_argument("--child", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.child:
        print(json.dumps(_train(options.child, options.steps)))
        return 0
    cores = num_cores()
    cases = [(1, "openmp"), *((cores, policy) for policy in POLICIES)]
    found: dict[str, list[dict[str, float]]] = {}
    with tempfile.TemporaryDirectory(prefix="benchmark-") as folder:
        _write_rows(Path(folder))
        for _ in range(options.rounds):
            for busy in (False, True):
                for threads, policy in cases:
                    with _burning(cores if busy else 0):
                        one = _measured(Path(folder), options.steps, threads=threads, policy=policy)
                    found.setdefault(f"{'busy' if busy else 'idle'} {threads} {policy}", []).append(one)
    figures = {name: {key: _median(rounds, key) for key in rounds[0]} for name, rounds in found.items()}
    print(f"{'':16}{'threads':>8}{'waiting':>9}{'rows/s':>9}{'CPU ms a row':>14}")
    for name, one in figures.items():
        where, threads, policy = name.split()
        print(f"{where:16}{threads:>8}{policy:>9}{one['rows_per_s']:9.1f}{one['cpu_ms_per_row']:14.1f}")
    if options.json:
        details = {"cpu": cpu_name(), "cores": cores, "load": os.getloadavg(), "date": time.strftime("%Y-%m-%d")}
        options.json.write_text(json.dumps(figures | {"details": details}, indent=1) + "\n", encoding="utf-8")
    return 0


def _median(rounds: list[dict[str, float]], key: str) -> float:
    return statistics.median(one[key] for one in rounds)


def _job(folder: Path, steps: int) -> Job:
    setup = SETUPS["a"]
    return Job(
        base=setup.save(folder / "base", None),  # type: ignore[arg-type]
        rows=folder / "rows",
        scratch=folder / "scratch",
        order=tuple(range(setup.batch_size)) * (steps + 1),
        batch_size=setup.batch_size,
        device="cpu",
        dtype="float32",
        num_workers=0,
        launched=True,
    )


def _write_rows(folder: Path) -> None:
    from transformers import AutoProcessor

    setup = SETUPS["a"]
    tokenizer = AutoProcessor.from_pretrained(_job(folder, 1).base).tokenizer
    write_rows(folder / "rows", setup, tokenizer, num_rows=setup.batch_size)


@contextmanager
def _burning(count: int) -> Iterator[None]:
    """Keep ``count`` processes computing during the block."""
    burners = [subprocess.Popen([sys.executable, "-c", BURN]) for _ in range(count)]
    try:
        yield
    finally:
        for burner in burners:
            burner.kill()
            burner.wait()


def _measured(folder: Path, steps: int, *, threads: int, policy: str) -> dict[str, float]:
    """Return the figures of one process that trains."""
    env = {name: value for name, value in os.environ.items() if name not in WAITING}
    env |= {"OMP_NUM_THREADS": str(threads), "FINETUNE_CACHE": str(folder / "cache"), **POLICIES[policy]}
    command = [sys.executable, "-m", "benchmarks.threads", "--child", str(folder), "--steps", str(steps)]
    done = subprocess.run(command, env=env, capture_output=True, text=True, check=True)
    figures: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return figures


def _train(folder: Path, steps: int) -> dict[str, float]:
    """Train on ready batches, one step more than is measured."""
    import torch

    from benchmarks.contestants.parts import base_and_batches, recipe_of
    from finetune.methods.adapter import attach

    job = _job(folder, steps)
    base, batches = base_and_batches(job)
    attachment = attach(base.host, recipe_of(job).method)
    optimizer = torch.optim.AdamW(attachment.parameters.values(), lr=job.learning_rate, fused=True)
    objective = base.objective(base.task(base.default_task))
    began = cpu = 0.0
    for number, batch in enumerate(batches):
        if number == 1:
            began, cpu = time.perf_counter(), _cpu_seconds()
        (term,) = objective.terms(base.model, batch).values()
        (term.loss_sum / term.num_items).backward()
        optimizer.step()
        optimizer.zero_grad()
    rows = steps * job.batch_size
    return {"rows_per_s": rows / (time.perf_counter() - began), "cpu_ms_per_row": 1e3 * (_cpu_seconds() - cpu) / rows}


def _cpu_seconds() -> float:
    used = resource.getrusage(resource.RUSAGE_SELF)
    return used.ru_utime + used.ru_stime


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))  # so that nothing is left behind
    sys.exit(main())
