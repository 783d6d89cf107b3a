"""Training side by side: ours, trl's SFTTrainer, a bare PyTorch loop, and the floor under them all.

python -m benchmarks.training --json benchmark.json      takes about 28 minutes on two idle CPU cores
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import sys
import tempfile
from importlib.util import find_spec
from pathlib import Path

import torch
from transformers import AutoProcessor

from benchmarks.contestants import CONTESTANTS, LAUNCHED, Job
from benchmarks.contestants.parts import order_of, recipe_of
from benchmarks.measure import BenchmarkError, Measured, measure
from benchmarks.models import SETUPS, Setup
from benchmarks.results import EPOCHS, SAME_LOSS, check_same_work, figures, machine, table
from benchmarks.rows import write_rows

_MODELS = "a,b,b4"


def main(arguments: list[str] | None = None) -> int:
    """Measure, print a table and write the figures."""
    options = _parse(arguments)
    results: dict[str, dict[str, Measured]] = {}
    num_rows = {name: _num_rows(SETUPS[name], options) for name in options.models}
    for name in options.models:
        with tempfile.TemporaryDirectory(prefix="benchmark-") as folder:
            os.environ["FINETUNE_CACHE"] = str(Path(folder) / "cache")  # nothing is left, and nothing found, elsewhere
            print(f"({name}) {SETUPS[name].title}: {', '.join(options.only)}", flush=True)
            results[name] = run_model(name, Path(folder), options, num_rows=num_rows[name])
    batch_sizes = {name: SETUPS[name].batch_size for name in options.models}
    reached = figures(results, num_rows=num_rows, batch_sizes=batch_sizes)
    titles = {name: SETUPS[name].title for name in options.models}
    print(table(results, reached, titles=titles, peak_tflops=options.peak_tflops if options.device == "cuda" else 0.0))
    if options.json:
        details = {
            "machine": machine(torch.device(options.device)),
            "device": options.device,
            "dtype": options.dtype,
            "rounds": options.rounds,
            "peak_tflops": options.peak_tflops,
            "same_environment": options.same_environment,
            "models": {
                model: {
                    "title": titles[model],
                    "batch_size": batch_sizes[model],
                    "rows": num_rows[model],
                    "tiles_per_image": SETUPS[model].tiles_per_image,
                    "contestants": {name: one.to_json() for name, one in found.items()},
                }
                for model, found in results.items()
            },
        }
        options.json.write_text(json.dumps(reached | {"details": details}, indent=1) + "\n", encoding="utf-8")
    return 0


def run_model(name: str, folder: Path, options: argparse.Namespace, *, num_rows: int) -> dict[str, Measured]:
    """Measure all contestants on one model.

    Args:
        name: the name of the model.
        folder: the folder for its weights, its rows and the files of the contestants.
        options: the options of the command.
        num_rows: the number of rows of an epoch.

    Raises:
        BenchmarkError: a contestant failed, or did not do the work of the others.
    """
    setup = SETUPS[name]
    dtype = getattr(torch, options.dtype)
    base = setup.save(folder / "base", dtype)
    rows = write_rows(folder / "rows", setup, AutoProcessor.from_pretrained(base).tokenizer, num_rows=num_rows)
    steps = options.steps or setup.steps

    def job(contestant: str, order: tuple[int, ...]) -> Job:
        return Job(
            base=base,
            rows=rows,
            scratch=folder / contestant,
            order=order,
            batch_size=setup.batch_size,
            device=options.device,
            dtype=options.dtype,
            num_workers=options.num_workers,
            launched=options.same_environment or contestant in LAUNCHED,
            projector=setup.projector,
            last_layers=setup.last_layers,
        )

    length = (options.rounds + 1) * steps * setup.batch_size
    order = order_of(recipe_of(job("order", (0,) * length)), num_rows=num_rows)
    names = [one for one in options.only if one in setup.contestants]
    found = measure({one: job(one, order) for one in names}, steps=steps, rounds=options.rounds)
    check_same_work(name, found, batch_size=setup.batch_size, tolerance=SAME_LOSS[options.dtype])
    return found


def _num_rows(setup: Setup, options: argparse.Namespace) -> int:
    """Return the rows of which all steps together, the warm-up's too, are three epochs."""
    steps = (options.rounds + 1) * (options.steps or setup.steps)
    return max(1, steps // EPOCHS) * setup.batch_size


def _parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.training", description=__doc__.splitlines()[0])
    parser.add_argument("--json", type=Path, metavar="FILE", help="file to write the figures to")
    parser.add_argument("--models", default=_MODELS, help=f"models to measure, of {', '.join(SETUPS)} ({_MODELS})")
    parser.add_argument("--only", help=f"contestants, of {', '.join(CONTESTANTS)} (all)")
    parser.add_argument("--rounds", type=int, default=5, help="rounds that count; one more warms up (5)")
    parser.add_argument("--steps", type=int, help="optimizer steps of a round (each model's own)")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="device (cpu)")
    parser.add_argument(
        "--dtype", choices=("float32", "bfloat16"), help="dtype of the frozen weights (float32; bfloat16 on cuda)"
    )
    parser.add_argument(
        "--peak-tflops", type=float, default=989.0, help="peak of the GPU in this dtype, for MFU (989: H200)"
    )
    parser.add_argument(
        "--num-workers", type=int, default=0, help="worker processes of each contestant that prepare batches (0)"
    )
    parser.add_argument(
        "--same-environment", action="store_true", help="give all contestants the environment of launch.sh"
    )
    options = parser.parse_args(arguments)
    options.dtype = options.dtype or ("bfloat16" if options.device == "cuda" else "float32")
    options.models = _names(options.models, SETUPS, parser)
    options.only = _names(options.only or ",".join(CONTESTANTS), CONTESTANTS, parser)
    if not find_spec("trl") and "trl" in options.only:
        parser.error("trl is not installed: pip install -e '.[bench]', or leave it out with --only")
    if options.rounds < 1:
        parser.error("--rounds must be at least 1")
    for name in options.models:
        steps = (options.rounds + 1) * (options.steps or SETUPS[name].steps)
        if steps % EPOCHS:
            parser.error(f"model {name}: {steps} steps, the warm-up's among them, are not {EPOCHS} whole epochs")
    return options


def _names(text: str, known: dict[str, object], parser: argparse.ArgumentParser) -> list[str]:
    names = text.split(",")
    if unknown := [name for name in names if name not in known]:
        parser.error(f"unknown: {', '.join(unknown)}; known are {', '.join(known)}")
    return names


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))  # so that nothing is left behind
    try:
        sys.exit(main())
    except BenchmarkError as error:
        sys.exit(f"error: {error}")
