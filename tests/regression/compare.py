"""Compare what two checkouts compute of a stored net, bit by bit.

python -m tests.regression.compare OLD_CHECKOUT [--new CHECKOUT] [--net NET] [--only NAME ...] [--recipes]

Each checkout computes all in one process, with one thread and this interpreter. Exits with 0 where every output is
equal in every bit, with 1 where one differs. Rounding differs between CPUs and between releases of torch, so two
checkouts can be compared so on one machine and in one environment only.
"""

import argparse
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np

from tests.regression.bases import build_base
from tests.regression.nets import HERE, NETS

ROOT = HERE.parents[1]
RUNNER = Path("tests", "regression", "outputs.py")


def compute(checkout: Path, net: Path, work: Path, *, only: list[str], recipes: bool) -> dict[str, np.ndarray]:
    """Return all that a checkout makes of a net, by name.

    Args:
        checkout: holds the package; its own ``outputs.py`` is run where it has one, else that of this checkout.
        net: the folder of the net.
        work: a folder to be made; it holds ``bases`` beside it.
        only: names of adapters; empty for all.
        recipes: whether to train the recipes too.
    """
    work.mkdir()
    runner = next(root / RUNNER for root in (checkout, ROOT) if (root / RUNNER).exists())
    arguments = [net, work.parent / "bases", work / "runs", work / "outputs.npz"]
    options = [*(["--only", *only] if only else []), *(["--recipes"] if recipes else [])]
    # Of the user's there is nothing: no cache, no registry, no keys.
    own = {"HOME": work, "FINETUNE_CACHE": work / "cache", "FINETUNE_REGISTRY": work / "registry"}
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("FINETUNE_", "PYTHON"))}
    done = subprocess.run(
        # -P: the folder of the file is no place to import from.
        [sys.executable, "-P", str(runner), *map(str, arguments), *options],
        cwd=checkout,
        env=kept
        | {name: str(path) for name, path in own.items()}
        | {"PYTHONPATH": str(checkout), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
    )
    if done.returncode:
        raise SystemExit(f"{checkout}: {runner} ended with {done.returncode}\n{done.stdout}{done.stderr}")
    with np.load(work / "outputs.npz") as arrays:
        return {name: arrays[name] for name in arrays.files}


def differences(old: dict[str, np.ndarray], new: dict[str, np.ndarray]) -> list[str]:
    """Return a line for each output that is not equal in every bit, with by how much it is off."""
    lines = [
        f"{name}: only the {'old' if name in old else 'new'} checkout has it"
        for name in sorted(old.keys() ^ new.keys())
    ]
    for name in sorted(old.keys() & new.keys()):
        was, now = old[name], new[name]
        if was.dtype == now.dtype and was.shape == now.shape and was.tobytes() == now.tobytes():
            continue
        if was.dtype.kind != "f":
            lines.append(f"{name}: {was.tolist()} became {now.tolist()}")
        elif was.shape != now.shape or was.dtype != now.dtype:
            lines.append(f"{name}: {was.dtype} {list(was.shape)} became {now.dtype} {list(now.shape)}")
        else:
            off, largest = np.abs(now - was).max(), np.abs(was).max()
            count = np.count_nonzero(now != was)
            lines.append(
                f"{name}: {count} of {was.size} values differ, by up to {off:.3g}, the largest is {largest:.3g}"
            )
    return lines


def compare(
    old: Path, new: Path = ROOT, *, net: Path = NETS[0], only: list[str] | None = None, recipes: bool = False
) -> tuple[list[str], int]:
    """Return the differences between two checkouts, and how many outputs were compared."""
    with tempfile.TemporaryDirectory() as name:
        work = Path(name)
        for stored in (net / "bases").iterdir():
            build_base(stored, work / "bases" / stored.name)
        options = {"only": only or [], "recipes": recipes}
        was = compute(old.resolve(), net, work / "old", **options)
        now = compute(new.resolve(), net, work / "new", **options)
    return differences(was, now), len(now)


def main(argv: list[str] | None = None) -> int:
    """Run the command and return its exit code."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("old", type=Path, metavar="OLD_CHECKOUT", help="the root of another checkout")
    parser.add_argument(
        "--new", type=Path, default=ROOT, metavar="CHECKOUT", help="what is compared; this one by default"
    )
    parser.add_argument("--net", type=Path, default=NETS[0], help="by default the oldest, which every checkout reads")
    parser.add_argument("--only", nargs="+", metavar="NAME", help="these adapters only")
    parser.add_argument("--recipes", action="store_true", help="train the net's recipes too, and compare their weights")
    args = parser.parse_args(argv)
    found, count = compare(args.old, args.new, net=args.net.resolve(), only=args.only, recipes=args.recipes)
    print("\n".join(found + [f"{len(found)} of {count} outputs differ"]))
    return 1 if found or not count else 0


if __name__ == "__main__":
    sys.exit(main())
