"""Filling the feature store beside the vision tower's bare forwards over the same images.

python -m benchmarks.filling --json FILE      about seven minutes on two idle CPU cores
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from transformers import AutoProcessor

from benchmarks.contestants import Job
from benchmarks.contestants.parts import recipe_of
from benchmarks.measure import BenchmarkError
from benchmarks.models import SETUPS
from benchmarks.results import machine
from benchmarks.rows import write_rows
from finetune.assemble.loading import base_of
from finetune.assemble.rows import training_rows
from finetune.runs.frozen_features import collator_of_run

if TYPE_CHECKING:
    from collections.abc import Sequence

    from finetune.assemble.base import Base
    from finetune.core.example import Example
    from finetune.recipe import Recipe

WANTED = 1.15  # times the bare forwards, at most


def main(arguments: list[str] | None = None) -> int:
    """Measure, print the figures and write them."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.filling", description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="b", choices=SETUPS, help="the model (b)")
    parser.add_argument("--rows", type=int, default=48, help="rows, each with an image of its own (48)")
    parser.add_argument("--rounds", type=int, default=3, help="alternating rounds, of which medians count (3)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="file to write the figures to")
    options = parser.parse_args(arguments)
    setup = SETUPS[options.model]
    found: dict[str, list[float]] = {"filling": [], "tower": []}
    with tempfile.TemporaryDirectory(prefix="benchmark-") as name:
        folder = Path(name)
        path = setup.save(folder / "base", None)
        write_rows(folder / "rows", setup, AutoProcessor.from_pretrained(path).tokenizer, num_rows=options.rows)
        job = Job(
            base=path, rows=folder / "rows", scratch=folder / "scratch", order=tuple(range(options.rows)),
            batch_size=setup.batch_size, device="cpu", dtype="float32", num_workers=0, launched=False,
        )  # fmt: skip
        recipe = recipe_of(job, store=True)
        for number in range(options.rounds + 1):
            base = base_of(recipe)
            rows = training_rows(recipe, base=base)
            tower = _bare_seconds(base, rows)
            os.environ["FINETUNE_CACHE"] = str(folder / f"cache-{number}")
            filling = _fill_seconds(recipe, base, rows)
            if number:  # the first round warms up
                found["tower"].append(tower)
                found["filling"].append(filling)
    medians = {name: statistics.median(seconds) for name, seconds in found.items()}
    ratio = medians["filling"] / medians["tower"]
    print(f"({options.model}) {setup.title}: {options.rows} images, {torch.get_num_threads()} threads")
    for name, seconds in medians.items():
        print(f"{name:8}{seconds:8.1f} s{seconds / options.rows:8.3f} s an image")
    print(f"filling / tower {ratio:.3f}, wanted <= {WANTED}: {'yes' if ratio <= WANTED else 'no'}")
    if options.json:
        details = {"machine": machine(torch.device("cpu")), "model": options.model, "rows": options.rows, "s": found}
        figures = {"filling_vs_tower": ratio, "details": details}
        options.json.write_text(json.dumps(figures, indent=1) + "\n", encoding="utf-8")
    return 0


@torch.inference_mode()
def _bare_seconds(base: Base, rows: Sequence[Example]) -> float:
    """Return the wall time of the tower's forwards over all images, which are opened and processed before."""
    model, family, collator = cast("Any", base.model), cast("Any", base.family), cast("Any", base.collator)
    inputs = [family.image_step(base.processor, collator.open(row)).inputs for row in rows]
    pixels = [{name: value for name, value in one.items() if name.startswith("pixel_")} for one in inputs]
    started = time.perf_counter()
    for one in pixels:
        model.get_image_features(**one)
    return time.perf_counter() - started


def _fill_seconds(recipe: Recipe, base: Base, rows: Any) -> float:
    """Return the wall time of all that happens before the first step with an empty store."""
    set_seed(recipe.seed)
    accelerator = Accelerator(cpu=True)
    started = time.perf_counter()
    collator = collator_of_run(recipe, base, rows, [], [], accelerator, lambda line: None)
    seconds = time.perf_counter() - started
    if collator is base.collator:
        raise BenchmarkError("the feature store must be on, got off")
    return seconds


if __name__ == "__main__":
    sys.exit(main())
