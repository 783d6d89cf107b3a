"""Running a recipe: evaluate the base, train, evaluate the adapter, save, publish."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from accelerate.utils import set_seed

from finetune.adapters.manifest import MANIFEST_NAME, AdapterManifest
from finetune.adapters.reference import AdapterRef
from finetune.build import Base, Batches, base_of, check_method, check_rows
from finetune.data.stream import Stream
from finetune.evaluation.split import evaluate_run, predictor_of
from finetune.evaluation.validation import Validator, base_alone, warnings_of
from finetune.families.quantization import quantized_modules
from finetune.preflight.finished_runs import RESULT
from finetune.runs.frozen_features import collator_of_run
from finetune.core.json_file import write_json
from finetune.methods.adapter import attach
from finetune.metrics.building import metrics_of
from finetune.metrics.names import BASE, TEST
from finetune.core.outside_text import safe_block, safe_line
from finetune.preflight import check_recipe
from finetune.recipe import PromptSection
from finetune.registry import AdapterRegistry
from finetune.runs.run_folder import open_run, run_lock, telling_of_a_full_disk, write_samples
from finetune.runs.run_rows import read_run_rows
from finetune.runs.saving import probe_effect, save_adapter, save_weights
from finetune.serving.known_bases import remember_base
from finetune.tasks.supervised_logits import why_all_logits
from finetune.training.accelerator import accelerator_of
from finetune.training.compiling import CompiledLayers
from finetune.training.log import RunLog
from finetune.training.loop import Trainer
from finetune.training.strategy import strategy_of
from finetune.training.trackers import check_trackers, finish_trackers, start_trackers
from finetune.runs.warm_start import Parent

if TYPE_CHECKING:
    from pathlib import Path

    from accelerate import Accelerator

    from finetune.adapters.manifest import Probe
    from finetune.evaluation.evaluate import Evaluation
    from finetune.evaluation.predict import Predictor
    from finetune.evaluation.scores import Scores
    from finetune.interfaces import Attachment, Metric, TaskCollator
    from finetune.recipe import Recipe
    from finetune.runs.run_rows import RunRows
    from finetune.training.checkpoint import Checkpoint, Checkpoints
    from finetune.training.replicated import Replicated
    from finetune.training.state import TrainState
    from finetune.training.validation import Validation

ADAPTER = "adapter"  # as an evaluation of a run names it, beside ``base``


@dataclass(frozen=True)
class RunResult:
    """The result of a training run."""

    folder: Path  # the run's
    adapter: Path  # the best adapter, complete with its manifest
    ref: str | None  # in the registry, when the recipe publishes
    metrics: dict[str, Scores]  # ``test``: of the adapter, ``base``: of the base alone on the same rows; as a manifest
    warnings: tuple[str, ...] = ()  # what should be known before the adapter is used


def train(recipe: Recipe, *, registry: AdapterRegistry | None = None) -> RunResult:
    """Run a recipe: evaluate the base on the test split, train, evaluate the adapter, save and publish it.

    Where the run's folder holds an unfinished run of the same recipe, that one goes on. A finished one is never
    overwritten: it is refused, moved aside or made longer, as ``train.resume`` says. One run at a time has the folder.

    Args:
        recipe: the recipe, from ``load_recipe``.
        registry: the registry to publish in; the default one if None.

    Raises:
        StoppedError: a signal asked to stop; the state is saved.
        FinetuneError: anything else that stops the run, with what to do.
    """
    registry = registry or AdapterRegistry()
    check_recipe(recipe, registry=registry)
    check_trackers(recipe.train.trackers)
    check_method(recipe)
    accelerator = accelerator_of(recipe)
    if recipe.adapter.publish and accelerator.is_main_process:
        # Hours later is too late for a key that is missing, or a passphrase that nobody is there to type.
        registry.guard.check_signer(AdapterRef.parse_name(recipe.adapter.publish).namespace)
    strategy = strategy_of(accelerator, recipe)
    try:
        with telling_of_a_full_disk(recipe.run_folder), run_lock(recipe, accelerator):
            return _train(recipe, strategy, registry)
    finally:
        finish_trackers(accelerator)


@dataclass(frozen=True, kw_only=True)
class _Run:
    """The objects that the steps of a run share.

    Attributes:
        recipe: the recipe, with the settings that its rows decided.
        registry: the registry to publish in.
        strategy: the strategy by which the processes share the work.
        log: the log of the run.
        parent: the adapter that the run starts from; None for a fresh one.
        base: the base that the run adapts.
        rows: the rows of all splits.
    """

    recipe: Recipe
    registry: AdapterRegistry
    strategy: Replicated
    log: RunLog
    parent: Parent | None
    base: Base
    rows: RunRows

    @property
    def accelerator(self) -> Accelerator:
        """The accelerator of the run."""
        return self.strategy.accelerator

    @property
    def folder(self) -> Path:
        """The folder of the run."""
        return self.recipe.run_folder

    def predictor(self, batches: Batches | TaskCollator, *, alone: bool) -> Predictor:
        """Return the predictor of rows by the base, ``alone`` or with the adapter."""
        return predictor_of(self.base, self.recipe, batches.prompt_batch, alone=alone, accelerator=self.accelerator)


def _train(recipe: Recipe, strategy: Replicated, registry: AdapterRegistry) -> RunResult:
    set_seed(recipe.seed)
    run = _load(recipe, strategy, registry)
    recipe, base, rows, log, accelerator = run.recipe, run.base, run.rows, run.log, run.accelerator
    checkpoints, start = open_run(
        recipe, base, rows.splits, accelerator, log.info, init_from=run.parent.ref if run.parent else None
    )
    start_trackers(accelerator, recipe)
    collator = collator_of_run(recipe, base, rows.train, [*rows.val, *rows.test], accelerator, log.info)
    rows.check_prompts(base, collator, when="before training")
    _show_rows(run, collator)
    evaluations: dict[str, Evaluation] = {}
    predictor = run.predictor(collator, alone=True)
    alone = None
    if not recipe.task.parts:  # without these the base predicts nothing
        if rows.test:
            evaluations[BASE] = evaluate_run(predictor, rows.test, recipe, log, BASE, known=start is not None)
        alone = base_alone(predictor, rows.val, evaluations.get(BASE), log)
    set_seed(recipe.seed)
    attachment = _attach(run)
    batches = Batches(collator, attachment.placeholders)
    predictor = run.predictor(batches, alone=False)
    state, total, attachment = _fit(run, attachment, batches, predictor, checkpoints, start)
    if rows.test:
        evaluations[ADAPTER] = evaluate_run(predictor, rows.test, recipe, log, ADAPTER)
    first = metrics_of(predictor.task)[0]
    notes = warnings_of(state, recipe.train, total_steps=total, base=alone, higher_is_better=first.higher_is_better)
    for note in notes:
        log.info(f"warning: {note}.")
    return _finish(run, collator, attachment, evaluations, first, notes, steps=state.best_step or state.step)


def _load(recipe: Recipe, strategy: Replicated, registry: AdapterRegistry) -> _Run:
    """Load the base and the rows, and place the base on the processes."""
    accelerator = strategy.accelerator
    track = accelerator.log if recipe.train.trackers else None
    main = accelerator.is_main_process
    log = RunLog(recipe.run_folder, every=recipe.train.logging_steps, main=main, track=track)
    parent = Parent.read(recipe.adapter.init_from, registry) if recipe.adapter.init_from else None
    with accelerator.main_process_first():  # what it notes of images is there for the others
        check_rows(recipe)
    base = base_of(recipe, device=strategy.load_device)
    if parent:
        parent.require_base(base)
    with accelerator.main_process_first():  # the others find what it looked up in the cache
        rows = read_run_rows(recipe, base, log.info)
    recipe = rows.recipe
    strategy.check_rows(rows.splits)
    strategy.split(base.model, base.towers)
    log.info(f"base {recipe.model.name_or_path} ({base.identity.model_type}, {base.identity.digest[:12]})")
    if base.quantization:
        names = quantized_modules(base.model)
        log.info(f"held in {base.quantization}: {len(names)} linear modules, {names[0]} to {names[-1]}")
    log.info(f"rows {rows.counts}")
    return _Run(recipe=recipe, registry=registry, strategy=strategy, log=log, parent=parent, base=base, rows=rows)


def _show_rows(run: _Run, collator: TaskCollator) -> None:
    """Log a few training rows as the model gets them, and keep them in the run's folder."""
    shown = [safe_line(collator.show(row)) for row in run.rows.first]
    for row in shown:
        run.log.info(f"  {row}")
    if run.accelerator.is_main_process:
        (run.folder / "samples.txt").write_text("\n".join(shown) + "\n", encoding="utf-8")


def _attach(run: _Run) -> Attachment:
    """Attach a fresh adapter, with the weights of its parent where it has one."""
    base, log = run.base, run.log
    attachment = attach(base.host, run.recipe.parts)
    log.info(f"adapter\n{attachment.describe()}")
    if run.parent:
        run.parent.write_into(attachment, base)
        log.info(f"  its weights are those of {run.parent.ref} to begin with")
    if isinstance(run.recipe.task, PromptSection) and (told := why_all_logits(base.model)):
        log.info(told)
    return attachment


def _fit(
    run: _Run,
    attachment: Attachment,
    batches: Batches,
    predictor: Predictor,
    checkpoints: Checkpoints,
    start: Checkpoint | None,
) -> tuple[TrainState, int, Attachment]:
    """Train, and leave the best weights in the model.

    Returns:
        The state at the end, the steps of the whole run, and the attachment that holds the best weights, frozen.
    """
    recipe, base, rows, log, accelerator = run.recipe, run.base, run.rows, run.log, run.accelerator
    folder, main, model_type = run.folder, accelerator.is_main_process, base.identity.model_type
    objective = base.objective(predictor.task, recipe.objectives, placeholders=attachment.placeholders)
    set_seed(recipe.seed, device_specific=True)  # each process draws a dropout of its own
    trainer = Trainer(
        base.model,
        attachment,
        objective,
        batches.training_batch,
        recipe.train,
        accelerator,
        log,
        seed=recipe.seed,
        strategy=run.strategy,
        checkpoints=checkpoints,
    )
    if start:
        trainer.restore(start)

    def keep() -> None:
        if not main:
            return
        try:
            save_weights(folder / "best", attachment, trainer.best, model_type=model_type)
        except OSError as error:  # a full disk; the checkpoints hold these weights too
            log.info(f"{folder / 'best'} could not be written ({error.strerror}). The run goes on.")

    compiled = CompiledLayers(base.model, base.towers.get("language", ()) if recipe.train.torch_compile else None)
    validator = Validator(
        predictor=predictor,
        objective=objective,
        examples=rows.val,
        training_batch=batches.training_batch,
        seed=recipe.seed,
    )

    def validate() -> Validation:
        base.model.eval()
        with compiled.paused():
            return validator(batch_size=trainer.state.batch_size)

    try:
        with compiled:
            state = trainer.train(rows.train, validate=validate if rows.val else None, on_better=keep)
    finally:
        if isinstance(rows.train, Stream):
            who = f"process {accelerator.process_index}: "  # each has met rows of its own
            rows.train.tell(log.info if main else lambda text: print(safe_block(who + text)))
    if isinstance(rows.train, Stream):
        rows.train.seen = state.step * trainer.plan.window
    last = run.strategy.tensors()
    if main:
        save_weights(folder / "last", attachment, last, model_type=model_type)
    if trainer.best:
        run.strategy.load(trainer.best)
    base.model.eval()
    return state, trainer.plan.total_steps, run.strategy.finish()


def _finish(
    run: _Run,
    collator: TaskCollator,
    attachment: Attachment,
    evaluations: dict[str, Evaluation],
    chosen_by: Metric,
    notes: list[str],
    *,
    steps: int,
) -> RunResult:
    """Save and publish the adapter, and write down that the run is finished.

    Args:
        run: the run.
        collator: the collator that makes the training batches.
        attachment: the adapter with its best weights.
        evaluations: the evaluations of ``base`` and ``adapter``, where there are test rows.
        chosen_by: the metric that chose the weights.
        notes: the notes that a user should read first.
        steps: the number of optimizer steps that made the weights.
    """
    recipe, folder = run.recipe, run.folder
    metrics = {{ADAPTER: TEST, BASE: BASE}[who]: found.scores for who, found in evaluations.items()}
    ref, probe = None, probe_effect(run.base, attachment)
    if run.accelerator.is_main_process:
        remember_base(run.base.identity, run.base.path)
        _save(run, collator, attachment, metrics, probe, steps=steps)
        if evaluations:
            write_samples(folder / "samples.html", recipe, evaluations)
        if recipe.adapter.publish:
            version = run.registry.publish(folder / "adapter", recipe.adapter.publish, aliases=recipe.adapter.aliases)
            ref = version.ref
            run.log.info(f"published {ref}" + (f"; {version.note}" if version.note else ""))
        chosen = {"metric": chosen_by.key, "higher_is_better": chosen_by.higher_is_better}
        write_json(folder / RESULT, {"ref": ref, "steps": steps, "warnings": notes, **chosen})
    run.accelerator.wait_for_everyone()
    return RunResult(folder, folder / "adapter", ref, metrics, tuple(notes))


def _save(
    run: _Run,
    collator: TaskCollator,
    attachment: Attachment,
    metrics: dict[str, Scores],
    probe: Probe,
    *,
    steps: int,
) -> None:
    """Save the adapter with its manifest, and check that its prompts are those of the training."""
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
    rows.check_prompts(base, collator, task=saved.task, placeholders=attachment.placeholders, when="after saving")
    run.log.info(f"adapter saved in {folder}")
