"""Processor seconds of two checkouts side by side: a training step, a question, a swap, a look into the registry.

    python -m benchmarks.checkouts OLD_CHECKOUT --json checkouts.json     about 15 minutes, on an idle machine

A pair is a process of each checkout, on one thread each, that take turns A B B A; of an operation the fastest round of
each counts, since the machine only ever adds to it. A ratio is the new checkout's time over the old one's. An operation
is held if the whole 90 % interval of its median ratio is below 1.05; if the interval holds 1.05, it is inconclusive.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np

from benchmarks.results import cpu_name

BOUND = 1.05
DRAWS = 10_000
ROUNDS = 12  # of each operation and pair, old and new in turn
# It calls public names alone, so that every checkout runs it. It does one round of what a line of its input names.
WORKER = """
import json, sys, tempfile, time
from pathlib import Path

import finetune
from PIL import Image

work = Path(tempfile.mkdtemp())
answers, sys.stdout = sys.stdout, sys.stderr


def recipe(name, steps):
    config = work / f"{name}.json"
    config.write_text(json.dumps({
        "name": name,
        "domain": "bench",
        "model": {"name_or_path": "pocket", "device": "cpu"},
        "method": {"name": "lora", "r": 16, "lora_alpha": 32},
        "data": {"source": "procedural", "name": "retail", "rows": {"train": 512}},
        "train": {"max_steps": steps, "batch_size": 16, "learning_rate": 1e-3, "output_dir": str(work / "runs"),
                  "feature_store": "off", "save_steps": 1000000},
    }))
    return finetune.load_recipe(config)


def train(name, steps):
    started = time.process_time()
    result = finetune.train(recipe(name, steps))
    return time.process_time() - started, result.adapter


def seconds(times, function):
    started = time.process_time()
    for _ in range(times):
        function()
    return (time.process_time() - started) / times


runs = iter(range(1_000_000))


def training_row():
    return (train(f"run{next(runs)}", 36)[0] - train(f"run{next(runs)}", 4)[0]) / (32 * 16)


registry = finetune.AdapterRegistry(work / "registry")
for name in ("short", "long"):
    registry.publish(train(name, 2)[1])
vlm = finetune.load("bench/short", registry=registry, base="pocket", device="cpu")
image = Image.new("RGB", (96, 96), (200, 30, 30))
pinned = [vlm.add("bench/short"), vlm.add("bench/long")]
fresh = finetune.AdapterRegistry(work / "registry")


def swap_both():
    vlm.use(pinned[1])
    vlm.use(pinned[0])


OPERATIONS = {
    "training row": training_row,
    "question": lambda: seconds(8, lambda: vlm.ask(image, "What color is the garment?")),
    "swap": lambda: seconds(10_000, swap_both) / 2,
    "resolve": lambda: seconds(200, lambda: fresh.resolve("bench/long@latest")),
}
for line in sys.stdin:
    print(json.dumps(OPERATIONS[line.strip()]()), file=answers, flush=True)
"""
# Operation -> rounds: training takes seconds.
OPERATIONS = {"training row": 4, "question": ROUNDS, "swap": ROUNDS, "resolve": ROUNDS}


class Worker:
    """A process of a checkout on one thread, with that checkout first on its path."""

    def __init__(self, checkout: Path, cache: str):
        env = os.environ | {"PYTHONPATH": str(checkout), "OMP_NUM_THREADS": "1", "FINETUNE_CACHE": cache}
        self._output = Path(cache) / "output.txt"
        with self._output.open("w") as file:
            self._process = subprocess.Popen(
                [sys.executable, "-c", WORKER],
                cwd=checkout, env=env, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=file, text=True,
            )  # fmt: skip

    def measure(self, operation: str) -> float:
        """Return the processor seconds of one round."""
        assert self._process.stdin and self._process.stdout
        self._process.stdin.write(f"{operation}\n")
        self._process.stdin.flush()
        line = self._process.stdout.readline()
        if not line:
            raise SystemExit(self._output.read_text()[-2000:])
        return float(json.loads(line))

    def close(self) -> None:
        """End the process."""
        self._process.communicate()


def measure(old: Path, new: Path) -> tuple[dict[str, float], dict[str, float]]:
    """Return operation -> processor seconds of its fastest round, of a process of each checkout that take turns."""
    with tempfile.TemporaryDirectory() as first, tempfile.TemporaryDirectory() as second:
        workers = {old: Worker(old, first), new: Worker(new, second)}
        found: dict[Path, dict[str, float]] = {old: {}, new: {}}
        for operation, rounds in OPERATIONS.items():
            for worker in workers.values():
                worker.measure(operation)  # to warm up
            for number in range(rounds):
                for checkout in (old, new) if number % 2 == 0 else (new, old):
                    seconds = workers[checkout].measure(operation)
                    found[checkout][operation] = min(seconds, found[checkout].get(operation, seconds))
        for worker in workers.values():
            worker.close()
    return found[old], found[new]


def interval(ratios: list[float], *, seed: int = 0) -> tuple[float, float]:
    """Return the 90 % interval of the median, by the bootstrap over pairs."""
    drawn = np.random.default_rng(seed).choice(ratios, size=(DRAWS, len(ratios)))
    low, high = np.quantile(np.median(drawn, axis=1), [0.05, 0.95])
    return float(low), float(high)


def verdict(low: float, high: float) -> str:
    """Return the verdict of an interval on the bound."""
    if high < BOUND:
        return "held"
    return "MISSED" if low > BOUND else "inconclusive"


def main(argv: list[str] | None = None) -> int:
    """Measure, print the table, and return 0 if all bounds hold."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("old", type=Path, metavar="OLD_CHECKOUT")
    parser.add_argument("--pairs", type=int, default=10, metavar="N", help="pairs of processes (10)")
    parser.add_argument("--json", type=Path, metavar="FILE")
    args = parser.parse_args(argv)
    new = Path(__file__).resolve().parents[1]
    pairs: list[tuple[dict[str, float], dict[str, float]]] = []
    for number in range(args.pairs):
        pairs.append(measure(args.old.resolve(), new))
        print(f"pair {number + 1} of {args.pairs}", file=sys.stderr, flush=True)
    rows = []
    for name in pairs[0][0]:
        ratios = [b[name] / a[name] for a, b in pairs]
        low, high = interval(ratios)
        rows.append({
            "operation": name,
            "old": statistics.median(a[name] for a, _ in pairs),
            "new": statistics.median(b[name] for _, b in pairs),
            "ratio": statistics.median(ratios),
            "interval": [low, high],
            "verdict": verdict(low, high),
        })  # fmt: skip
        row = rows[-1]
        print(
            f"{name:14} {row['old'] * 1e3:9.3f} ms {row['new'] * 1e3:9.3f} ms   ratio {row['ratio']:.3f} "
            f"({low:.3f} to {high:.3f})  {row['verdict']}"
        )
    if args.json:
        facts = {"cpu": cpu_name(), "platform": platform.platform(), "pairs": args.pairs}
        args.json.write_text(json.dumps(facts | {"rows": rows}, indent=2) + "\n", encoding="utf-8")
    return 0 if all(row["verdict"] == "held" for row in rows) else 1


if __name__ == "__main__":
    sys.exit(main())
