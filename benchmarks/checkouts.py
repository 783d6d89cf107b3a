"""Processor seconds of two checkouts side by side: a training step, a question, a swap, a look into the registry.

    python -m benchmarks.checkouts OLD_CHECKOUT --json checkouts.json     about 15 minutes, on an idle machine

Pairs of processes run in the order A B B A, each on one thread with its checkout first on the path. A ratio is the
new checkout's time over the old one's of the same pair; of what is repeated in a process, the fastest round counts,
since the machine only ever adds to it. Held is what has its whole 90 % interval of the median ratio
below 1.05; where the interval holds 1.05, nothing is said.
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
# It calls public names alone, so that every checkout runs it.
WORKER = """
import json, sys, tempfile, time
from pathlib import Path

import finetune

work = Path(tempfile.mkdtemp())


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


def seconds(times, function, rounds=9):
    found = []
    for _ in range(rounds + 1):
        started = time.process_time()
        for _ in range(times):
            function()
        found.append((time.process_time() - started) / times)
    return min(found[1:])


out = {}
train("warm", 2)
short, one = train("short", 4)
long, two = train("long", 64)
out["training row"] = (long - short) / (60 * 16)
registry = finetune.AdapterRegistry(work / "registry")
for folder in (one, two):
    registry.publish(folder)
vlm = finetune.load("bench/short", registry=registry, base="pocket", device="cpu")
from PIL import Image

image = Image.new("RGB", (96, 96), (200, 30, 30))
out["question"] = seconds(10, lambda: vlm.ask(image, "What color is the garment?"))
pinned = [vlm.add("bench/short"), vlm.add("bench/long")]
turn = iter(range(10**9))
out["swap"] = seconds(3000, lambda: vlm.use(pinned[next(turn) % 2]))
fresh = finetune.AdapterRegistry(work / "registry")
out["resolve"] = seconds(100, lambda: fresh.resolve("bench/long@latest"))
print("RESULT " + json.dumps(out))
"""


def measure(checkout: Path) -> dict[str, float]:
    """Return operation -> processor seconds, of one process of a checkout."""
    with tempfile.TemporaryDirectory() as cache:
        env = os.environ | {"PYTHONPATH": str(checkout), "OMP_NUM_THREADS": "1", "FINETUNE_CACHE": cache}
        done = subprocess.run(
            [sys.executable, "-c", WORKER], cwd=checkout, env=env, capture_output=True, text=True, check=False
        )
    line = next((line for line in done.stdout.splitlines() if line.startswith("RESULT ")), None)
    if line is None:
        raise SystemExit(f"{checkout}: {done.stderr[-2000:]}")
    found: dict[str, float] = json.loads(line.removeprefix("RESULT "))
    return found


def interval(ratios: list[float], *, seed: int = 0) -> tuple[float, float]:
    """Return the 90 % interval of the median, by the bootstrap over pairs."""
    drawn = np.random.default_rng(seed).choice(ratios, size=(DRAWS, len(ratios)))
    low, high = np.quantile(np.median(drawn, axis=1), [0.05, 0.95])
    return float(low), float(high)


def verdict(low: float, high: float) -> str:
    """Return what an interval says of the bound."""
    if high < BOUND:
        return "held"
    return "MISSED" if low > BOUND else "inconclusive"


def main(argv: list[str] | None = None) -> int:
    """Measure, print the table, and return 0 where all of it is held."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("old", type=Path, metavar="OLD_CHECKOUT")
    parser.add_argument("--pairs", type=int, default=10, metavar="N", help="of processes (10)")
    parser.add_argument("--json", type=Path, metavar="FILE")
    args = parser.parse_args(argv)
    new = Path(__file__).resolve().parents[1]
    pairs: list[tuple[dict[str, float], dict[str, float]]] = []
    for number in range(args.pairs):
        order = (args.old.resolve(), new) if number % 2 == 0 else (new, args.old.resolve())
        found = {checkout: measure(checkout) for checkout in order}
        pairs.append((found[args.old.resolve()], found[new]))
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
