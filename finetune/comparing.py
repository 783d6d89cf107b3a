"""Adapters side by side: each judged on the test rows of each recipe, on one base that is loaded once."""

from __future__ import annotations

from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from finetune.build import base_of, examples_of
from finetune.data.survey import Survey
from finetune.errors import RecipeError
from finetune.judging import answer_split
from finetune.outside_text import safe_line
from finetune.preflight import check_comparison
from finetune.preflight.run import how_rows_are_put
from finetune.prompt_checks import check_answers, with_longest_answer
from finetune.registry import AdapterRegistry
from finetune.serving.app import VisionLanguageModel

if TYPE_CHECKING:
    from collections.abc import Sequence

    from finetune.recipe import Recipe


def evaluate(
    refs: Sequence[str],
    recipes: Sequence[Recipe],
    *,
    registry: AdapterRegistry | None = None,
    predictions: dict[tuple[str, str], list[str]] | None = None,
) -> list[dict[str, Any]]:
    """Judges each adapter on the test split of each recipe, all on one base that is loaded once.

    Args:
        refs: registry references, adapter folders, or ``base``.
        recipes: all must name the same base.
        registry: where names are looked up; the default one if None.
        predictions: filled with (ref, recipe name) -> one answer a row, where given.

    Returns:
        One row per adapter and recipe: adapter, config, exact_match, interval, majority, blank_image, n, by_kind, and
        probe: the verdict on the adapter's effect here, and how far it is from the recorded one, relative to it.
    """
    check_comparison(refs, recipes, registry=registry)
    base = base_of(next((recipe for recipe in recipes if how_rows_are_put(recipe)), recipes[0]))
    vlm = VisionLanguageModel(base, registry=registry or AdapterRegistry())
    rows = []
    for recipe in recipes:
        examples = examples_of(recipe, "test", base=base)
        if not examples:
            raise RecipeError(f"{recipe.name}: the recipe has no test split to judge on")
        survey = Survey.of(examples)
        check_answers(recipe.task, {"test": survey}, print)
        recipe = recipe.model_copy(update={"task": with_longest_answer(recipe.task, survey)})
        for ref in refs:
            with vlm.using(None if ref == "base" else ref):
                title = f"{ref} on {recipe.name}"
                scores, answers = answer_split(base, recipe, vlm.prompt_batch, examples, title=title)
                probe = asdict(vlm.adapter.probe) if vlm.adapter else None
            rows.append({"adapter": ref, "config": recipe.name, **scores.to_json(), "probe": probe})
            if predictions is not None:
                predictions[ref, recipe.name] = [answer.text for answer in answers]
    return rows


def table(rows: Sequence[dict[str, Any]]) -> str:
    """Returns the rows of ``evaluate`` as a table for people.

    Below it, where the base computes otherwise than the one an adapter was saved on (quantized, in half precision):
    by how much that changes the adapter's effect.
    """
    head = ("adapter", "config", "exact match", "95 % interval", "majority", "blank image", "rows")
    lines = [head] + [
        (
            row["adapter"],
            row["config"],
            f"{row['exact_match']:.3f}",
            f"{row['interval'][0]:.3f} to {row['interval'][1]:.3f}",
            f"{row['majority']:.3f}",
            f"{row['blank_image']:.3f}",
            str(row["n"]),
        )
        for row in rows
    ]
    lines = [tuple(map(safe_line, line)) for line in lines]
    widths = [max(len(line[i]) for line in lines) for i in range(len(head))]
    out = ["  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)) for line in lines]
    probes = {row["adapter"]: row["probe"] for row in rows if row["probe"]}
    for ref, probe in probes.items():
        if probe["verdict"] == "inconclusive":
            out.append(f"{ref}: its effect on the probe is below the noise of this base, so it could not be verified")
        elif probe["difference"] > 0.01:
            out.append(f"{ref}: its effect on the probe differs by {probe['difference']:.0%} from the recorded one")
    return "\n".join(out)
