"""A comparison of adapters: each is evaluated on the test rows of each recipe, on one base that is loaded once.

Importing this module loads no torch.
"""

from __future__ import annotations

from dataclasses import asdict
from functools import partial
from typing import TYPE_CHECKING

from finetune.core.extras import require_extra
from finetune.core.outside_text import safe_line
from finetune.core.quick_imports import quick_imports
from finetune.errors import RecipeError
from finetune.evaluation.cells import cells
from finetune.metrics.names import BASE
from finetune.preflight import check_comparison
from finetune.preflight.run import how_rows_are_put
from finetune.registry import AdapterRegistry

if TYPE_CHECKING:
    from collections.abc import Sequence

    from finetune.evaluation.evaluate import Evaluation
    from finetune.recipe import Recipe


def evaluate(
    refs: Sequence[str], recipes: Sequence[Recipe], *, registry: AdapterRegistry | None = None
) -> list[Evaluation]:
    """Evaluate each adapter on the test split of each recipe, all on one base that is loaded once.

    Args:
        refs: the models to compare: registry references, adapter folders, or ``base``.
        recipes: the recipes with the rows; all must name the same base.
        registry: the registry of the references; the default one if None.

    Returns:
        One evaluation for each adapter and recipe, those of one recipe together.

    Raises:
        FinetuneError: the evaluation cannot be done. All checks that need no torch come first.
    """
    require_extra("torch", what="evaluate")
    check_comparison(refs, recipes, registry=registry)
    with quick_imports():
        from finetune.assemble.loading import base_of
        from finetune.assemble.rows import examples_of
        from finetune.data.survey import Survey
        from finetune.evaluation.evaluate import Evaluation, evaluate_rows
        from finetune.evaluation.prompt_checks import check_answers, from_survey, with_longest_answer
        from finetune.evaluation.split import predictor_of
        from finetune.serving.vision_language_model import VisionLanguageModel

    base = base_of(next((recipe for recipe in recipes if how_rows_are_put(recipe)), recipes[0]))
    vlm = VisionLanguageModel(base, registry=registry or AdapterRegistry())
    found = []
    for recipe in recipes:
        if not recipe.task.is_complete:
            task = from_survey(recipe.task, Survey.of(examples_of(recipe, "train")))
            recipe = recipe.model_copy(update={"task": task})
        examples = examples_of(recipe, "test", base=base)
        if not examples:
            raise RecipeError(
                f"{recipe.name}: an evaluation needs test rows, got none. Set data.test, or data.rows, in the recipe."
            )
        survey = Survey.of(examples)
        check_answers(recipe.task, {"test": survey}, print)
        recipe = recipe.model_copy(update={"task": with_longest_answer(recipe.task, survey)})
        for ref in refs:
            with vlm.using(None if ref == BASE else ref):
                prompt_batch = partial(vlm.prompt_batch, options=recipe.task)
                predictor = predictor_of(base, recipe, prompt_batch, alone=ref == BASE)
                scores, rows = evaluate_rows(predictor, examples, title=f"{ref} on {recipe.name}")
                probe = asdict(vlm.adapter.probe) if vlm.adapter else None
            found.append(Evaluation(adapter=ref, config=recipe.name, scores=scores, rows=rows, probe=probe))
    return found


def table(evaluations: Sequence[Evaluation]) -> str:
    """Return evaluations as a table for people, with every metric of their tasks.

    The lines below it show how much an adapter's effect changes, if the base computes in another way than the base it
    was saved on (quantized, or in half precision).
    """
    head, lines = cells(evaluations)
    shown = [tuple(map(safe_line, line)) for line in (head, *lines)]
    widths = [max(map(len, column)) for column in zip(*shown, strict=True)]
    out = ["  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)) for line in shown]
    probes = {one.adapter: one.probe for one in evaluations if one.probe}
    for ref, probe in probes.items():
        if probe["verdict"] == "inconclusive":
            out.append(f"{ref}: its effect on the probe is below the noise of this base, so it could not be verified")
        elif probe["difference"] > 0.01:
            out.append(f"{ref}: its effect on the probe differs by {probe['difference']:.0%} from the recorded one")
    return "\n".join(out)
