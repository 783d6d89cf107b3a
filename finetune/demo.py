"""The demo: two synthetic domains trained on the pocket model, published, swapped on one base, and evaluated."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from finetune.assemble.rows import examples_of
from finetune.core.folder_lock import locked
from finetune.errors import LaunchError
from finetune.evaluation.compare import evaluate, table
from finetune.evaluation.report import samples_of, write_page
from finetune.metrics.names import MAJORITY
from finetune.preflight.finished_runs import is_finished
from finetune.recipe import Recipe, load_recipe
from finetune.registry import AdapterRegistry
from finetune.runs.train import train
from finetune.serving.loading import load

if TYPE_CHECKING:
    from finetune.evaluation.evaluate import Evaluation

CONFIGS = ("medical/phantoms.yaml", "retail/products.yaml")
PAGE, TITLE = "demo.html", "One base, two domains"
SAMPLES = 8  # images a domain on the page


def run_demo(folder: Path, *, json_file: Path | None = None) -> int:
    """Run the demo from end to end.

    Args:
        folder: the folder of runs, registry and page.
        json_file: the file for the table as JSON; None for no file.

    Returns:
        0 if every claim held, else 1.

    Raises:
        FolderInUseError: another demo holds the folder.
    """
    with locked(folder, what_else="Or choose another folder (--output-dir)."):
        _refuse_foreign(folder / PAGE)
        return _run(folder, json_file)


def _refuse_foreign(page: Path) -> None:
    """Raise LaunchError if the file of the demo's page holds something else."""
    if page.exists() and not (page.is_file() and TITLE in page.read_text(encoding="utf-8", errors="replace")):
        raise LaunchError(
            f"the file {page} must hold the page of a demo, but it holds something else. Nothing was started. Move it "
            "away, or choose another folder (--output-dir)."
        )


def _run(folder: Path, json_file: Path | None) -> int:
    started = time.monotonic()
    registry = AdapterRegistry(folder / "registry")
    recipes = [_recipe(name, folder) for name in CONFIGS]
    refs = []
    for recipe in recipes:
        print(f"\n== training {recipe.domain} (synthetic images)", flush=True)
        ref = train(recipe, registry=registry).ref
        assert ref is not None
        refs.append(ref)
    print("\n== both adapters on one base", flush=True)
    evaluations = evaluate(["base", *refs], recipes, registry=registry)
    print(table(evaluations))
    print("\n== swapping on one loaded base")
    swap = _swap(recipes, refs, registry)
    page = folder / PAGE
    _write_page(page, recipes, refs, evaluations)
    verdict = _verdict(recipes, refs, evaluations) | {"logits bit-equal to before after swapping out": swap}
    for claim, held in verdict.items():
        print(f"{'held    ' if held else 'NOT HELD'}  {claim}")
    if json_file:
        json_file.parent.mkdir(parents=True, exist_ok=True)
        found = {"rows": [one.to_json() for one in evaluations], "held": verdict}
        json_file.write_text(json.dumps(found, indent=2) + "\n")
    print(f"\nLook at {page} ({time.monotonic() - started:.0f} s in all)")
    return 0 if all(verdict.values()) else 1


def _recipe(name: str, folder: Path) -> Recipe:
    overrides = [f"train.output_dir={json.dumps(str(folder))}"]
    if is_finished(load_recipe(_config(name), overrides).run_folder):
        overrides.append("train.resume=never")  # a repeated demo trains again, and keeps the earlier runs
    return load_recipe(_config(name), overrides)


def _config(name: str) -> Path:
    path = Path(__file__).parents[1] / "recipes" / "configs" / name
    if not path.is_file():
        raise LaunchError(
            f"the demo needs a checkout of the project with its recipes, but {path} is missing. "
            "Run ./launch.sh demo in a checkout."
        )
    return path


def _swap(recipes: list[Recipe], refs: list[str], registry: AdapterRegistry) -> bool:
    """Ask with each adapter and without one; return whether the base's logits are bit-equal afterwards."""
    vlm = load("base", base=recipes[0].model.name_or_path, registry=registry)
    before = vlm.base.probe(0)
    for recipe, ref in zip(recipes, refs, strict=True):
        example = examples_of(recipe, "test")[0]
        question = str(example.meta["question"])
        plain = vlm.ask(example.images[0], question)
        with vlm.using(ref):
            adapted = vlm.ask(example.images[0], question)
        print(f"{question} base: {plain!r}, {ref}: {adapted!r}, right: {example.answers[0]!r}")
    return torch.equal(before, vlm.base.probe(0))


def _verdict(recipes: list[Recipe], refs: list[str], evaluations: list[Evaluation]) -> dict[str, bool]:
    found = {(one.adapter, one.config): one.scores for one in evaluations}
    out = {}
    for recipe, ref in zip(recipes, refs, strict=True):
        base, own = found["base", recipe.name], found[ref, recipe.name]
        out[f"{ref}: at least .15 above the base"] = own.first.value >= base.first.value + 0.15
        majority = next(iter(own.baselines[MAJORITY].values()))
        assert own.first.interval is not None
        out[f"{ref}: lower 95 % bound above the majority answer"] = own.first.interval[0] > majority.value
    return out


def _write_page(path: Path, recipes: list[Recipe], refs: list[str], evaluations: list[Evaluation]) -> None:
    of_recipe = {recipe.name: [one for one in evaluations if one.config == recipe.name] for recipe in recipes}
    write_page(
        path,
        title=TITLE,
        intro="A frozen pocket model and two LoRA adapters, each trained for about a minute on synthetic images. "
        "The marked lines are adapters on their own domain.",
        evaluations=evaluations,
        own={ref: recipe.name for ref, recipe in zip(refs, recipes, strict=True)},
        samples={
            f"{recipe.domain} (synthetic)": samples_of(of_recipe[recipe.name], most=SAMPLES) for recipe in recipes
        },
        footer="All images are drawn by a program. They show no patient and no product.",
    )
