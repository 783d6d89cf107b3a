"""What a recipe does: evaluate the base, train, evaluate the adapter, save, publish."""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import TYPE_CHECKING

from accelerate import Accelerator
from accelerate.utils import DistributedDataParallelKwargs, is_deepspeed_available, set_seed

from finetune.adapters.manifest import MANIFEST_NAME, AdapterManifest
from finetune.adapters.reference import AdapterRef
from finetune.build import Base, Batches, base_of, check_method, check_rows
from finetune.data.stream import Stream
from finetune.errors import TrainingError
from finetune.evaluation.base_predictions import BasePredictions
from finetune.evaluation.cells import words
from finetune.evaluation.evaluate import values_of
from finetune.evaluation.predict import predict
from finetune.evaluation.rows import make_rows
from finetune.evaluation.split import evaluate_run
from finetune.evaluation.validation import BaseAlone, Validator, warnings_of
from finetune.families.quantization import quantized_modules
from finetune.finished_runs import RESULT
from finetune.frozen_features import collator_of_run
from finetune.json_file import write_json
from finetune.methods.adapter import attach
from finetune.metrics.building import metrics_of
from finetune.metrics.names import BASE, TEST
from finetune.outside_text import safe_block, safe_line
from finetune.preflight import check_recipe
from finetune.recipe import PromptSection
from finetune.registry import AdapterRegistry
from finetune.run_folder import open_run, run_lock, telling_of_a_full_disk, write_samples
from finetune.run_rows import read_run_rows
from finetune.saving import probe_effect, save_adapter, save_weights
from finetune.serving.known_bases import remember_base
from finetune.tasks.head import why_all_logits
from finetune.training.compiling import CompiledLayers
from finetune.training.log import RunLog
from finetune.training.loop import Trainer
from finetune.training.strategy import strategy_of
from finetune.training.trackers import check_trackers, finish_trackers, start_trackers
from finetune.warm_start import Parent

if TYPE_CHECKING:
    from pathlib import Path

    from finetune.data.stream import Rows
    from finetune.evaluation.evaluate import Evaluation
    from finetune.evaluation.scores import Scores
    from finetune.example import Example
    from finetune.interfaces import Attachment, TaskCollator
    from finetune.recipe import Recipe
    from finetune.training.checkpoint import Checkpoint, Checkpoints
    from finetune.training.replicated import Replicated
    from finetune.training.state import TrainState
    from finetune.training.validation import Validation

ADAPTER = "adapter"  # as an evaluation of a run names it, beside ``base``


@dataclass(frozen=True)
class RunResult:
    """What a training run leaves."""

    folder: Path  # the run's
    adapter: Path  # the best adapter, complete with its manifest
    ref: str | None  # in the registry, when the recipe publishes
    metrics: dict[str, Scores]  # ``test``: of the adapter, ``base``: of the base alone on the same rows; as a manifest
    warnings: tuple[str, ...] = ()  # what should be known before the adapter is used


def train(recipe: Recipe, *, registry: AdapterRegistry | None = None) -> RunResult:
    """Run a recipe: evaluate the base on the test split, train, evaluate the adapter, save, publish.

    Where the run's folder holds an unfinished run of the same recipe, that one goes on. A finished one is never
    overwritten: it is refused, moved aside or made longer, as ``train.resume`` says. One run at a time has the folder.

    Args:
        recipe: from ``load_recipe``.
        registry: where to publish; the default one if None.

    Raises:
        StoppedError: a signal asked to stop; the state is saved.
        FinetuneError: anything else that stops the run, with what to do.
    """
    registry = registry or AdapterRegistry()
    check_recipe(recipe, registry=registry)
    check_trackers(recipe.train.trackers)
    check_method(recipe)
    accelerator = _accelerator(recipe)
    if recipe.adapter.publish and accelerator.is_main_process:
        # Hours later is too late for a key that is missing, or a passphrase that nobody is there to type.
        registry.guard.check_signer(AdapterRef.parse_name(recipe.adapter.publish).namespace)
    strategy = strategy_of(accelerator, recipe)
    try:
        with telling_of_a_full_disk(recipe.run_folder), run_lock(recipe, accelerator):
            return _train(recipe, strategy, registry)
    finally:
        finish_trackers(accelerator)


def _train(recipe: Recipe, strategy: Replicated, registry: AdapterRegistry) -> RunResult:
    set_seed(recipe.seed)
    accelerator = strategy.accelerator
    main, folder = accelerator.is_main_process, recipe.run_folder
    track = accelerator.log if recipe.train.trackers else None
    log = RunLog(folder, every=recipe.train.logging_steps, main=main, track=track)
    parent = Parent.read(recipe.adapter.init_from, registry) if recipe.adapter.init_from else None
    with accelerator.main_process_first():  # what it notes of images is there for the others
        check_rows(recipe)
    base = base_of(recipe, device=strategy.load_device)
    if parent:
        parent.require_base(base)
    with accelerator.main_process_first():  # the others find what it looked up in the cache
        rows = read_run_rows(recipe, base, log.say)
    recipe = rows.recipe
    strategy.check_rows(rows.splits)
    strategy.split(base.model, base.towers)
    log.say(f"base {recipe.model.name_or_path} ({base.identity.model_type}, {base.identity.digest[:12]})")
    if base.quantization:
        names = quantized_modules(base.model)
        log.say(f"held in {base.quantization}: {len(names)} linear modules, {names[0]} to {names[-1]}")
    log.say(f"rows {rows.counts}")
    checkpoints, start = open_run(
        recipe, base, rows.splits, accelerator, log.say, init_from=parent.ref if parent else None
    )
    start_trackers(accelerator, recipe)
    collator = collator_of_run(recipe, base, rows.train, [*rows.val, *rows.test], accelerator, log.say)
    rows.check_prompts(base, collator, when="before training")
    shown = [safe_line(collator.show(row)) for row in rows.first]
    for row in shown:
        log.say(f"  {row}")
    if main:
        (folder / "samples.txt").write_text("\n".join(shown) + "\n", encoding="utf-8")
    evaluations: dict[str, Evaluation] = {}
    if rows.test and not recipe.task.parts:  # without them the base alone predicts nothing
        evaluations[BASE] = evaluate_run(
            base,
            recipe,
            collator.prompt_batch,
            rows.test,
            accelerator,
            log,
            BASE,
            known=start is not None,
        )
    alone = _base_alone(recipe, base, collator, rows.val, evaluations.get(BASE), accelerator, log)
    set_seed(recipe.seed)
    attachment = attach(base.host, recipe.parts)
    log.say(f"adapter\n{attachment.describe()}")
    if parent:
        parent.write_into(attachment, base)
        log.say(f"  its weights are those of {parent.ref} to begin with")
    if isinstance(recipe.task, PromptSection) and (told := why_all_logits(base.model)):
        log.say(told)
    batches = Batches(collator, attachment.placeholders)
    state, total, attachment = _fit(
        recipe, base, attachment, batches, rows.train, rows.val, strategy, log, checkpoints, start
    )
    steps = state.best_step or state.step
    if rows.test:
        evaluations[ADAPTER] = evaluate_run(base, recipe, batches.prompt_batch, rows.test, accelerator, log, ADAPTER)
    metrics = {{ADAPTER: TEST, BASE: BASE}[who]: found.scores for who, found in evaluations.items()}
    first = metrics_of(base.task(recipe.task))[0]
    notes = warnings_of(state, recipe.train, total_steps=total, base=alone, higher_is_better=first.higher_is_better)
    for note in notes:
        log.say(f"warning: {note}.")
    ref, probe = None, probe_effect(base, attachment)
    if main:
        remember_base(base.identity, base.path)
        parents = [parent.ref] if parent else []
        save_adapter(
            folder / "adapter", recipe, base, attachment, rows.splits, metrics,
            probe=probe, steps=steps, parents=parents,
        )  # fmt: skip
        saved = AdapterManifest.parse((folder / "adapter" / MANIFEST_NAME).read_bytes())
        rows.check_prompts(base, collator, task=saved.task, placeholders=attachment.placeholders, when="after saving")
        log.say(f"adapter saved in {folder / 'adapter'}")
        if evaluations:
            write_samples(folder / "samples.html", recipe, evaluations)
        if recipe.adapter.publish:
            version = registry.publish(folder / "adapter", recipe.adapter.publish, aliases=recipe.adapter.aliases)
            ref = version.ref
            log.say(f"published {ref}" + (f"; {version.note}" if version.note else ""))
        chosen = {"metric": first.key, "higher_is_better": first.higher_is_better}
        write_json(folder / RESULT, {"ref": ref, "steps": steps, "warnings": notes, **chosen})
    accelerator.wait_for_everyone()
    return RunResult(folder, folder / "adapter", ref, metrics, tuple(notes))


def _fit(
    recipe: Recipe,
    base: Base,
    attachment: Attachment,
    batches: Batches,
    learnt: Rows,
    val: list[Example],
    strategy: Replicated,
    log: RunLog,
    checkpoints: Checkpoints,
    start: Checkpoint | None,
) -> tuple[TrainState, int, Attachment]:
    """Trains, and leaves the best weights in the model.

    Returns:
        The state at the end, the steps of the whole run, and the attachment that holds the best weights, frozen.
    """
    accelerator = strategy.accelerator
    task, folder, main = base.task(recipe.task), recipe.run_folder, accelerator.is_main_process
    model_type = base.identity.model_type
    objective = base.objective(task, recipe.objectives, placeholders=attachment.placeholders)
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
        strategy=strategy,
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
            log.say(f"{folder / 'best'} could not be written ({error.strerror}). The run goes on.")

    compiled = CompiledLayers(base.model, base.towers.get("language", ()) if recipe.train.torch_compile else None)

    validator = Validator(
        model=base.model,
        task=task,
        objective=objective,
        examples=val,
        training_batch=batches.training_batch,
        prompt_batch=batches.prompt_batch,
        accelerator=accelerator,
        seed=recipe.seed,
    )

    def validate() -> Validation:
        base.model.eval()
        with compiled.paused():
            return validator(eval_batch_size=recipe.train.eval_batch_size, batch_size=trainer.state.batch_size)

    try:
        with compiled:
            state = trainer.train(learnt, validate=validate if val else None, on_better=keep)
    finally:
        if isinstance(learnt, Stream):
            who = f"process {accelerator.process_index}: "  # each has met rows of its own
            learnt.tell(log.say if main else lambda text: print(safe_block(who + text)))
    if isinstance(learnt, Stream):
        learnt.seen = state.step * trainer.plan.window
    last = strategy.tensors()
    if main:
        save_weights(folder / "last", attachment, last, model_type=model_type)
    if trainer.best:
        strategy.load(trainer.best)
    base.model.eval()
    return state, trainer.plan.total_steps, strategy.finish()


def _base_alone(
    recipe: Recipe,
    base: Base,
    collator: TaskCollator,
    val: list[Example],
    evaluated: Evaluation | None,
    accelerator: Accelerator,
    log: RunLog,
) -> BaseAlone | None:
    """Return what the base did before training: on validation rows where it was not evaluated on test rows."""
    if evaluated is not None:
        return BaseAlone(split="test", all_right=all(row.right for row in evaluated.rows))
    if not val or recipe.task.parts:
        return None
    task = base.task(recipe.task)
    predictions = predict(
        base.model,
        task,
        val,
        collator.prompt_batch,
        batch_size=recipe.train.eval_batch_size,
        accelerator=accelerator,
        title="evaluating the base",
        kept=BasePredictions(base, recipe.task, recipe.train.eval_batch_size, accelerator.num_processes),
    )
    for name, value in values_of(task, val, predictions).items():
        log.say(f"base on validation: {words(name)} {value}, {value.n} rows")
    return BaseAlone(split="validation", all_right=all(row.right for row in make_rows(task, val, predictions)))


def _accelerator(recipe: Recipe) -> Accelerator:
    """Returns the accelerator of this run, after checking that it is what was asked for."""
    trackers = list(recipe.train.trackers)
    if os.environ.get("ACCELERATE_USE_DEEPSPEED") == "true" and not is_deepspeed_available():
        raise TrainingError("DeepSpeed is not installed: pip install deepspeed, or use recipes/accelerate/fsdp2.yaml.")
    accelerator = Accelerator(
        gradient_accumulation_steps=1,
        cpu=recipe.model.device == "cpu",
        log_with=trackers or None,
        project_dir=str(recipe.run_folder / "trackers"),
        # Every process has the base's buffers, and one that takes a step again must not wait for the others to.
        kwargs_handlers=[DistributedDataParallelKwargs(broadcast_buffers=False)],
    )
    _check_launch(accelerator, recipe)
    return accelerator


def _check_launch(accelerator: Accelerator, recipe: Recipe) -> None:
    # The second is torchrun's: processes that it started may each have become a run of their own.
    for asked in (os.environ.get("FINETUNE_NUM_PROCESSES"), os.environ.get("WORLD_SIZE")):
        if asked and int(asked) != accelerator.num_processes:
            raise TrainingError(
                f"{asked} processes were asked for, but this run has {accelerator.num_processes}. On a CPU use "
                "NPROC=N ./launch.sh CONFIG: accelerate launch --cpu starts one process only."
            )
    if accelerator.mixed_precision != "no":
        raise TrainingError(
            f"accelerate's mixed_precision is {accelerator.mixed_precision}; the recipe's model.dtype says what the "
            "base is held in. Set mixed_precision: no in the accelerate config."
        )
    if recipe.model.device not in ("auto", accelerator.device.type):
        raise TrainingError(f"model.device is {recipe.model.device}, but accelerate gives {accelerator.device}")
