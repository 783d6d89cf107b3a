"""The figures of all contestants: checks that all did the same work, ratios, and a table for people."""

from __future__ import annotations

import platform
import time
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from benchmarks.measure import BenchmarkError
from benchmarks.rows import ANSWER_TOKENS

if TYPE_CHECKING:
    from collections.abc import Mapping

    import torch

    from benchmarks.measure import Measured

SAME_LOSS = {"float32": 1e-4, "bfloat16": 0.05}  # nats; summing in another order moves a loss less than that
EPOCHS = 3  # that all steps of a run are

# Figure -> what it should reach; at most for the last two, at least for all others.
WANTED = {
    "uncached_vs_trl": 1.6,
    "uncached_vs_bare": 0.95,
    "stored_vs_trl": 4.0,
    "stored_vs_trl_4_tiles": 5.0,
    "stored_vs_floor": 0.9,
    "three_epochs_vs_trl": 2.2,
    "stored_projector_vs_trl": 3.5,
    "stored_last_third_vs_images": 2.0,
    "memory_vs_trl": 1.0,
    "max_loss_difference": 1e-5,
}
_AT_MOST = ("memory_vs_trl", "max_loss_difference")
Results = dict[str, dict[str, "Measured"]]  # model -> contestant


def check_same_work(model: str, found: Mapping[str, Measured], *, batch_size: int, tolerance: float) -> None:
    """Check that every contestant trained as many parameters, on as many tokens, from the same loss.

    A fresh LoRA adds nothing, so the first loss is the base's on the first rows: other rows, another order of them or
    other tokens would give another.

    Args:
        model: the name of the model.
        found: each contestant -> its figures.
        batch_size: the number of rows of a step.
        tolerance: the largest difference of the first losses, in nats.

    Raises:
        BenchmarkError: the contestants did not do the same work.
    """
    trainable = {name: one.trainable for name, one in found.items()}
    if len(set(trainable.values())) > 1:
        raise BenchmarkError(f"model {model}: all contestants must train as many parameters, got {trainable}")
    wanted = batch_size * ANSWER_TOKENS
    wrong = {name: sorted(set(one.supervised)) for name, one in found.items() if set(one.supervised) != {wanted}}
    if wrong:
        raise BenchmarkError(f"model {model}: each step of a contestant must supervise {wanted} tokens, got {wrong}")
    first = {name: one.losses[0] for name, one in found.items()}
    if max(first.values()) - min(first.values()) > tolerance:
        raise BenchmarkError(f"model {model}: the first losses must differ by at most {tolerance} nats, got {first}")


def figures(results: Results, *, num_rows: Mapping[str, int], batch_sizes: Mapping[str, int]) -> dict[str, float]:
    """Return the ratios of all pairs that were measured; of times, theirs over ours.

    Args:
        results: each model -> each contestant -> its figures.
        num_rows: each model -> the number of rows of an epoch, which fill the store.
        batch_sizes: each model -> the number of rows of a step.
    """
    out: dict[str, float] = {}

    def ratio(name: str, model: str, theirs: str, ours: str) -> None:
        found = results.get(model, {})
        if theirs in found and ours in found:
            out[name] = found[theirs].seconds / found[ours].seconds

    ratio("uncached_vs_trl", "a", "trl", "ours")
    ratio("uncached_vs_bare", "a", "bare", "ours")
    ratio("stored_vs_trl", "b", "trl", "stored")
    ratio("stored_vs_trl_4_tiles", "b4", "trl", "stored")
    ratio("stored_vs_floor", "b", "floor", "stored")
    ratio("stored_projector_vs_trl", "b-projector", "trl", "stored")
    ratio("stored_last_third_vs_images", "b-last-third", "images", "stored")
    if "trl" in results.get("b", {}) and "stored" in results["b"]:
        steps = EPOCHS * num_rows["b"] / batch_sizes["b"]
        trl, stored = results["b"]["trl"], results["b"]["stored"]
        out["three_epochs_vs_trl"] = steps * trl.seconds / (stored.fill_seconds + steps * stored.seconds)
    shares = [
        found[name].peak_bytes / found["trl"].peak_bytes
        for found in results.values()
        for name in ("ours", "stored")
        if "trl" in found and name in found
    ]
    if shares:
        out["memory_vs_trl"] = max(shares)
    differences = [
        abs(one - other)
        for found in results.values()
        if "ours" in found and "stored" in found
        for one, other in zip(found["ours"].losses, found["stored"].losses, strict=True)
    ]
    if differences:
        out["max_loss_difference"] = max(differences)
    return out


def machine(device: torch.device) -> dict[str, Any]:
    """Return the machine, the versions and the date of a measurement."""
    import torch

    names = ("torch", "transformers", "peft", "accelerate", "trl")
    return {
        "date": time.strftime("%Y-%m-%d"),
        "cpu": cpu_name(),
        "threads": torch.get_num_threads(),
        "gpu": torch.cuda.get_device_name(device) if device.type == "cuda" else None,
        "python": platform.python_version(),
        "versions": {name: version(name) for name in names if find_spec(name)},
    }


def table(
    results: Results, reached: Mapping[str, float], *, titles: Mapping[str, str], peak_tflops: float = 0.0
) -> str:
    """Return everything as text; ``peak_tflops`` are those of the GPU, and 0 leaves its columns out."""
    lines = []
    for model, found in results.items():
        head = f"{'':8}{'s a step':>10}{'CPU s':>9}{'fill s':>9}{'peak MiB':>10}"
        lines += ["", f"({model}) {titles[model]}", head + (f"{'GPU GiB':>9}{'MFU':>7}" if peak_tflops else "")]
        for name, one in found.items():
            on_gpu = f"{one.cuda_bytes / 2**30:>9.2f}{one.mfu(peak_tflops):>7.1%}" if peak_tflops else ""
            lines.append(
                f"{name:8}{one.seconds:>10.4f}{one.cpu_seconds:>9.4f}{one.fill_seconds:>9.2f}"
                f"{one.peak_bytes / 2**20:>10.0f}{on_gpu}"
            )
    lines += ["", f"{'':24}{'reached':>10}  wanted"]
    for name, wanted in WANTED.items():
        if name in reached:
            at_most = name in _AT_MOST
            verdict = "yes" if (reached[name] <= wanted if at_most else reached[name] >= wanted) else "no"
            lines.append(f"{name:24}{reached[name]:>10.3g}  {'<=' if at_most else '>='} {wanted:g}: {verdict}")
        else:
            lines.append(f"{name:24}{'-':>10}  not measured")
    return "\n".join(lines)


def cpu_name() -> str:
    """Return the name of the processor."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.machine())
