"""The speed of torch's two libraries for float32 products on this CPU: the reason for finetune/core/matmul.py.

python -m benchmarks.matmul --json FILE      takes seconds, with one thread
"""

from __future__ import annotations

import argparse
import json
import platform
import time
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch.nn.functional import linear as by_torch

from finetune.core.matmul import ONEDNN_IS_FASTER

if TYPE_CHECKING:
    from collections.abc import Callable

SHAPES = [(784, 192, 192), (784, 192, 512), (784, 512, 192), (256, 576, 1536), (64, 576, 576), (16, 576, 576)]  # N I O


def main(arguments: list[str] | None = None) -> int:
    """Measure, print the figures and write them."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.matmul", description=__doc__.splitlines()[0])
    parser.add_argument("--json", type=Path, metavar="FILE", help="file to write the figures to")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    figures = {}
    print(f"{'rows':>6}{'in':>6}{'out':>6}{'torch':>9}{'oneDNN':>9}  GFLOP/s")
    for rows, inner, outer in SHAPES:
        x, weight = torch.randn(rows, inner), torch.randn(outer, inner)
        operations = 2 * rows * inner * outer / 1e9
        found = {
            "torch": operations / _seconds(lambda x=x, weight=weight: by_torch(x, weight)),
            "onednn": operations / _seconds(lambda x=x, weight=weight: _by_onednn(x, weight)),
        }
        figures[f"{rows}x{inner}x{outer}"] = found
        print(f"{rows:6}{inner:6}{outer:6}{found['torch']:9.0f}{found['onednn']:9.0f}")
    print(f"oneDNN is used here: {'yes' if ONEDNN_IS_FASTER else 'no'}")
    if options.json:
        machine = {"cpu": torch.backends.cpu.get_cpu_capability(), "torch": torch.__version__}
        details = {**machine, "python": platform.python_version(), "date": time.strftime("%Y-%m-%d")}
        whole = {"gflops": figures, "used": ONEDNN_IS_FASTER, "details": details}
        options.json.write_text(json.dumps(whole, indent=1) + "\n", encoding="utf-8")
    return 0


def _by_onednn(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    return torch.ops.mkldnn._linear_pointwise(x, weight, None, "none", [], "")


def _seconds(call: Callable[[], object], rounds: int = 50) -> float:
    """Return the least CPU time of a call: other processes on the machine only make it longer."""
    call()
    times = []
    for _ in range(rounds):
        began = time.process_time()
        for _ in range(5):
            call()
        times.append((time.process_time() - began) / 5)
    return min(times)


if __name__ == "__main__":
    raise SystemExit(main())
