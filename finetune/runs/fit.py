"""The training of a run: the trainer, its validation, and the weights that are kept."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

from accelerate.utils import set_seed

from finetune.core.outside_text import safe_block
from finetune.data.stream import Stream
from finetune.evaluation.validation import Validator
from finetune.runs.saving import save_weights
from finetune.training.compiling import CompiledLayers
from finetune.training.loop import Trainer

if TYPE_CHECKING:
    from collections.abc import Callable

    from transformers import PreTrainedModel

    from finetune.assemble.batches import Batches
    from finetune.evaluation.predict import Predictor
    from finetune.interfaces import Attachment
    from finetune.runs.run import Run
    from finetune.training.state import TrainState
    from finetune.training.validation import AnyValidation


@dataclass(frozen=True, kw_only=True)
class Fitted:
    """A trained adapter with its best weights in the model.

    Attributes:
        state: the state at the end of the run.
        total_steps: the number of optimizer steps of the whole run.
        attachment: the attachment that holds the best weights, frozen.
    """

    state: TrainState
    total_steps: int
    attachment: Attachment


def fit(run: Run, attachment: Attachment, batches: Batches, predictor: Predictor) -> Fitted:
    """Train, and leave the best weights in the model.

    Args:
        run: the run.
        attachment: the adapter to train.
        batches: the batches, with the placeholders of the adapter's prompt.
        predictor: the predictor of rows by the base with the adapter.
    """
    recipe, base, train_rows = run.recipe, run.base, run.rows.train
    objective = base.objective(predictor.task, recipe.objectives, placeholders=attachment.placeholders)
    set_seed(recipe.seed, device_specific=True)  # each process draws a dropout of its own
    trainer = Trainer(
        base.model,
        attachment,
        objective,
        batches.training_batch,
        recipe.train,
        run.accelerator,
        run.log,
        seed=recipe.seed,
        strategy=run.strategy,
        checkpoints=run.checkpoints,
    )
    if run.start:
        trainer.restore(run.start)
    compiled = CompiledLayers(base.model, base.towers.get("language", ()) if recipe.train.torch_compile else None)
    validator = Validator(
        predictor=predictor,
        objective=objective,
        examples=run.rows.val,
        training_batch=batches.training_batch,
        seed=recipe.seed,
        ends_when_decided=recipe.train.end_decided_validations,
    )
    try:
        with compiled:
            state = trainer.train(
                train_rows,
                validate=_validation(base.model, trainer, validator, compiled) if run.rows.val else None,
                on_better=partial(_keep_best, run, attachment, trainer),
            )
    finally:
        _report_stream(run)
    if isinstance(train_rows, Stream):
        train_rows.seen = state.step * trainer.plan.total_batch_size
    last = run.strategy.tensors()
    if run.accelerator.is_main_process:
        save_weights(run.folder / "last", attachment, last, model_type=base.identity.model_type)
    if trainer.best:
        run.strategy.load(trainer.best)
    base.model.eval()
    return Fitted(state=state, total_steps=trainer.plan.total_steps, attachment=run.strategy.finish())


def _validation(
    model: PreTrainedModel, trainer: Trainer, validator: Validator, compiled: CompiledLayers
) -> Callable[[], AnyValidation]:
    """Return the function that validates the adapter with its present weights."""

    def validate() -> AnyValidation:
        model.eval()
        with compiled.paused():
            return validator(batch_size=trainer.state.batch_size, best=trainer.state.best_score)

    return validate


def _keep_best(run: Run, attachment: Attachment, trainer: Trainer) -> None:
    """Write the best weights so far into the folder of the run; a full disk does not stop the run."""
    if not run.accelerator.is_main_process:
        return
    folder = run.folder / "best"
    try:
        save_weights(folder, attachment, trainer.best, model_type=run.base.identity.model_type)
    except OSError as error:
        run.log.info(
            f"the best weights could not be written to {folder} ({error.strerror}). The run goes on; its "
            "checkpoints hold these weights too."
        )


def _report_stream(run: Run) -> None:
    """Log the rows that a stream left out; each process reads rows of its own."""
    if not isinstance(run.rows.train, Stream):
        return
    who = f"process {run.accelerator.process_index}: "
    main = run.accelerator.is_main_process
    run.rows.train.log_skipped(run.log.info if main else lambda text: print(safe_block(who + text)))
