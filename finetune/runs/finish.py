"""The end of a run: the adapter is saved, checked and published, and the result is written."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from finetune.adapters.manifest import MANIFEST_NAME, AdapterManifest
from finetune.metrics.names import BASE, TEST
from finetune.preflight.result import Result
from finetune.runs.run_folder import write_samples
from finetune.runs.saving import probe_effect, save_adapter
from finetune.serving.known_bases import remember_base

if TYPE_CHECKING:
    from pathlib import Path

    from finetune.adapters.manifest import Probe
    from finetune.evaluation.evaluate import Evaluation
    from finetune.evaluation.scores import Scores
    from finetune.interfaces import Attachment, Metric
    from finetune.runs.fit import Fitted
    from finetune.runs.run import Run

ADAPTER = "adapter"  # the name of its evaluation in a run, beside ``base``


@dataclass(frozen=True)
class RunResult:
    """The result of a training run."""

    folder: Path  # the folder of the run
    adapter: Path  # the folder of the best adapter, with its manifest
    ref: str | None  # the reference in the registry; None if the recipe publishes nothing
    metrics: dict[str, Scores]  # ``test`` -> scores of the adapter, ``base`` -> of the base alone, on the same rows
    warnings: tuple[str, ...] = ()  # notes to read before the adapter is used


def finish(
    run: Run, fitted: Fitted, evaluations: dict[str, Evaluation], chosen_by: Metric, notes: list[str]
) -> RunResult:
    """Save and publish the adapter, and write the result of the run.

    Args:
        run: the run.
        fitted: the adapter with its best weights.
        evaluations: the evaluations of ``base`` and ``adapter``, where there are test rows.
        chosen_by: the metric that chose the weights.
        notes: the notes that a user should read first.
    """
    recipe, folder, state = run.recipe, run.folder, fitted.state
    steps = state.best_step or state.step
    metrics = {{ADAPTER: TEST, BASE: BASE}[who]: found.scores for who, found in evaluations.items()}
    ref, probe = None, probe_effect(run.base, fitted.attachment)
    if run.accelerator.is_main_process:
        remember_base(run.base.identity, run.base.path)
        _save(run, fitted.attachment, metrics, probe, steps=steps)
        if evaluations:
            write_samples(folder / "samples.html", recipe, evaluations)
        if recipe.adapter.publish:
            version = run.registry.publish(folder / "adapter", recipe.adapter.publish, aliases=recipe.adapter.aliases)
            ref = version.ref
            run.log.info(f"published {ref}" + (f"; {version.note}" if version.note else ""))
        Result(
            ref=ref,
            steps=steps,
            warnings=tuple(notes),
            metric=chosen_by.key,
            higher_is_better=chosen_by.higher_is_better,
            val=state.best_score,
            metrics={name: scores.to_json() for name, scores in metrics.items()},
        ).write(folder)
    run.accelerator.wait_for_everyone()
    return RunResult(folder, folder / "adapter", ref, metrics, tuple(notes))


def _save(run: Run, attachment: Attachment, metrics: dict[str, Scores], probe: Probe, *, steps: int) -> None:
    """Save the adapter with its manifest, and check that its prompts match those of the training."""
    base, rows, folder = run.base, run.rows, run.folder / "adapter"
    save_adapter(
        folder,
        run.recipe,
        base,
        attachment,
        rows.splits,
        metrics,
        probe=probe,
        steps=steps,
        parents=[run.parent.ref] if run.parent else [],
    )
    saved = AdapterManifest.parse((folder / MANIFEST_NAME).read_bytes())
    rows.check_prompts(base, run.collator, task=saved.task, placeholders=attachment.placeholders, when="after saving")
    run.log.info(f"adapter saved in {folder}")
