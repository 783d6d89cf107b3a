"""Training from a recipe: evaluate the base, train an adapter, evaluate it, save it and publish it."""

from __future__ import annotations

from typing import TYPE_CHECKING

from accelerate.utils import set_seed

from finetune.adapters.reference import AdapterRef
from finetune.assemble.batches import Batches
from finetune.assemble.loading import check_method
from finetune.evaluation.linear_probe import worse_than_probe
from finetune.evaluation.split import evaluate_run
from finetune.evaluation.validation import base_alone, warnings_of, worse_than_base
from finetune.launch.threads import set_threads
from finetune.metrics.building import metrics_of
from finetune.metrics.names import BASE
from finetune.preflight import check_recipe
from finetune.registry import AdapterRegistry
from finetune.runs.finish import ADAPTER, RunResult, finish
from finetune.runs.fit import fit
from finetune.runs.linear_probe import probe_run
from finetune.runs.run import Run
from finetune.runs.run_folder import full_disk_explained, run_lock
from finetune.training.accelerator import accelerator_of
from finetune.training.strategy import strategy_of
from finetune.training.trackers import check_trackers, finish_trackers

if TYPE_CHECKING:
    from finetune.evaluation.evaluate import Evaluation
    from finetune.recipe import Recipe
    from finetune.training.replicated import Replicated


def train(recipe: Recipe, *, registry: AdapterRegistry | None = None) -> RunResult:
    """Run a recipe: evaluate the base on the test split, train, evaluate the adapter, save and publish it.

    If the run's folder holds an unfinished run of the same recipe, that run resumes. It never overwrites a finished
    run: ``train.resume`` chooses between an error, moving that run aside, and extending it. One run at a time has the
    folder.

    Args:
        recipe: the recipe, from ``load_recipe``.
        registry: the registry to publish in; None for the default one.

    Raises:
        StoppedError: a signal asked to stop; the state is saved.
        FinetuneError: any other error that stops the run, with advice.
    """
    registry = registry or AdapterRegistry()
    check_recipe(recipe, registry=registry)
    check_trackers(recipe.train.trackers)
    check_method(recipe)
    set_threads(recipe.train.num_threads)
    accelerator = accelerator_of(recipe)
    if recipe.adapter.publish and accelerator.is_main_process:
        # Check the key before hours of training: at the end no user may be present to type its passphrase.
        registry.guard.check_signer(AdapterRef.parse_name(recipe.adapter.publish).namespace)
    strategy = strategy_of(accelerator, recipe)
    try:
        with full_disk_explained(recipe.run_folder), run_lock(recipe, accelerator):
            return _train(recipe, strategy, registry)
    finally:
        finish_trackers(accelerator)


def _train(recipe: Recipe, strategy: Replicated, registry: AdapterRegistry) -> RunResult:
    set_seed(recipe.seed)
    run = Run.load(recipe, strategy, registry)
    recipe, log, rows = run.recipe, run.log, run.rows
    rows.check_prompts(run.base, run.collator, when="before training")
    run.show_rows()
    evaluations: dict[str, Evaluation] = {}
    predictor = run.predictor(run.collator, alone=True)
    probe = probe_run(run, predictor.task)
    alone = None
    if not recipe.task.parts:  # without these the base predicts nothing
        if rows.test:
            known = run.start is not None
            evaluations[BASE] = evaluate_run(predictor, rows.test, recipe, log, BASE, known=known, probe=probe)
        alone = base_alone(predictor, rows.val, evaluations.get(BASE), log)
    set_seed(recipe.seed)
    attachment = run.attach()
    batches = Batches(run.collator, attachment.placeholders)
    predictor = run.predictor(batches, alone=False)
    fitted = fit(run, attachment, batches, predictor)
    if rows.test:
        evaluations[ADAPTER] = evaluate_run(predictor, rows.test, recipe, log, ADAPTER, probe=probe)
    first = metrics_of(predictor.task)[0]
    notes = warnings_of(
        fitted.state,
        recipe.train,
        total_steps=fitted.total_steps,
        base=alone,
        higher_is_better=first.higher_is_better,
    )
    if evaluations.keys() >= {ADAPTER, BASE}:
        notes += worse_than_base(evaluations[BASE].scores, evaluations[ADAPTER].scores)
    if probe is not None and ADAPTER in evaluations:
        notes += worse_than_probe(evaluations[ADAPTER], probe, metrics_of(predictor.task))
    for note in notes:
        log.info(f"warning: {note}.")
    return finish(run, fitted, evaluations, first, notes)
