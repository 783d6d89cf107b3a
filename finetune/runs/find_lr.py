"""The learning-rate range test (Smith 2015, https://arxiv.org/abs/1506.01186): rates at which the loss falls.

The test trains a fresh adapter for a few steps while the learning rate grows exponentially. The loss does not change
while the rate is too small, then falls, and rises when the rate is too large. After its lowest point, the smoothed loss
rises half-way back to its start at some rate; the test suggests a tenth of that rate. This rise is steep, so its rate
is certain. The lowest point is not: the curve is flat and noisy there. The test saves nothing.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from accelerate import Accelerator
from accelerate.utils import set_seed

from finetune.assemble.batches import Batches
from finetune.assemble.loading import base_of, check_method
from finetune.assemble.rows import training_rows
from finetune.errors import StoppedError, TrainingError
from finetune.methods.adapter import attach
from finetune.preflight import check_rates, check_recipe
from finetune.training.loop import Trainer

if TYPE_CHECKING:
    from collections.abc import Sequence

    from finetune.assemble.base import Base
    from finetune.recipe import Recipe, TrainSection

GIVE_UP = 2.0  # times the loss of the first steps; above it the test ends
LEAST_FALL = 0.1  # of the first loss; less is noise
WIDTH = 40  # characters of the longest bar


@dataclass(frozen=True, kw_only=True)
class Curve:
    """The loss at each rate, and the suggestion that follows from it.

    Attributes:
        rates: the learning rates, ascending.
        losses: the loss before the step with each rate.
        smoothed: the mean over the tenth of all steps around each step.
        suggestion: a rate to train with; None if the curve shows none.
        why: the source of the suggestion, or the reason why there is none.
    """

    rates: tuple[float, ...]
    losses: tuple[float, ...]
    smoothed: tuple[float, ...]
    suggestion: float | None
    why: str

    def __str__(self) -> str:
        """Return the curve as text: one line for each rate, with a bar in proportion to the loss."""
        low, high = min(self.smoothed), max(self.smoothed)
        step = max(1, math.ceil(len(self.rates) / 30))
        lines = [f"{'learning rate':>13}  {'loss':>8}"]
        for rate, loss in [*zip(self.rates, self.smoothed, strict=True)][::step]:
            bar = "#" * max(1, round(WIDTH * (loss - low) / ((high - low) or 1)))
            lines.append(f"{rate:>13.2e}  {loss:>8.4f}  {bar}")
        found = "no suggestion" if self.suggestion is None else f"suggested: train.learning_rate={self.suggestion:.1e}"
        return "\n".join([*lines, f"{found} ({self.why})"])


def find_lr(recipe: Recipe, *, first: float = 1e-6, last: float = 1.0, steps: int = 100) -> Curve:
    """Run the test in this process, on the recipe's rows, batch size and method.

    Args:
        recipe: the recipe, from ``load_recipe``; its learning rate, schedule and length are not used.
        first: the rate of the first step.
        last: the rate of the last step; the test ends earlier if the loss rises too far.
        steps: the number of optimizer steps.

    Raises:
        RecipeError: the range is empty, or there are too few steps.
        FinetuneError: an error that would stop a run of this recipe at its start.
    """
    check_rates(first, last, steps)
    check_recipe(recipe, splits=("train",), writes=False)
    check_method(recipe)
    accelerator = Accelerator(gradient_accumulation_steps=1, cpu=recipe.model.device == "cpu")
    set_seed(recipe.seed)
    base = base_of(recipe, device=str(accelerator.device))
    attachment = attach(base.host, recipe.parts)
    recorder = _Recorder()
    trainer = Trainer(
        base.model,
        attachment,
        base.objective(base.task(recipe.task), recipe.objectives, placeholders=attachment.placeholders),
        Batches(base.collator_of(recipe.task), attachment.placeholders).training_batch,
        _without_schedule(recipe.train, steps),
        accelerator,
        recorder,  # type: ignore[arg-type]
        seed=recipe.seed,
    )
    rates = [first * (last / first) ** (step / (steps - 1)) for step in range(steps)]
    losses, stopped = _losses(trainer, recorder, recipe, base, rates)
    curve = curve_of(rates[: len(losses)], losses) if losses else None
    # A rate that is far too large ends a good curve; an error before any good step is a real one.
    if curve is None or (stopped is not None and curve.suggestion is None):
        assert stopped is not None
        raise stopped
    return curve


def curve_of(rates: Sequence[float], losses: Sequence[float]) -> Curve:
    """Return the curve with its suggestion."""
    smoothed = smooth(losses)
    lowest = min(range(len(smoothed)), key=smoothed.__getitem__)
    half_way = (smoothed[0] + smoothed[lowest]) / 2
    risen = next((i for i in range(lowest, len(smoothed)) if smoothed[i] > half_way), None)
    suggestion = None
    if smoothed[0] - smoothed[lowest] < LEAST_FALL * smoothed[0]:
        why = "the loss never fell: try a higher last rate or more steps, or check the rows"
    elif risen is None:
        why = "the loss did not rise again before the end: try a higher last rate"
    else:
        suggestion = rates[risen] / 10
        why = f"a tenth of {rates[risen]:.1e}, at which the loss is half-way back to its start"
    return Curve(rates=tuple(rates), losses=tuple(losses), smoothed=tuple(smoothed), suggestion=suggestion, why=why)


def smooth(losses: Sequence[float]) -> list[float]:
    """Return for each value the mean over the tenth of all values around it, fewer at the ends.

    The mean is centred: a running mean would shift the lowest point towards higher rates.
    """
    reach = len(losses) // 20
    windows = [losses[max(0, i - reach) : i + reach + 1] for i in range(len(losses))]
    return [sum(window) / len(window) for window in windows]


def _without_schedule(options: TrainSection, steps: int) -> TrainSection:
    """Return options under which the loop's own rate is 1 at every step."""
    return options.model_copy(
        update={
            "epochs": None,
            "max_steps": steps,
            "learning_rate": 1.0,
            "lr_scheduler_type": "constant",
            "warmup_ratio": 0.0,
        }
    )


class _Recorder:
    """A recorder that replaces the run's log: it keeps the losses, and ends the run when they rise too far."""

    def __init__(self) -> None:
        self.losses: list[float] = []

    def start(self, *args: Any, **options: Any) -> None:
        pass

    def info(self, text: str) -> None:
        pass

    def close(self) -> None:
        pass

    def step(self, step: int, *, loss: float, **values: Any) -> None:
        self.losses.append(loss)
        if sum(self.losses[-5:]) > GIVE_UP * sum(self.losses[:5]):
            raise _Hopeless


class _Hopeless(Exception):
    """The signal that the loss has risen too far."""


def _losses(
    trainer: Trainer, recorder: _Recorder, recipe: Recipe, base: Base, rates: Sequence[float]
) -> tuple[list[float], TrainingError | None]:
    stopped = None

    def set_rate(optimizer: Any, args: Any, options: Any) -> None:
        for group in optimizer.param_groups:
            group["lr"] *= rates[len(recorder.losses)]

    hook = trainer.strategy.optimizer.register_step_pre_hook(set_rate)
    try:
        trainer.train(training_rows(recipe, base=base))
    except _Hopeless:
        pass
    except StoppedError:
        raise
    except TrainingError as error:
        stopped = error
    finally:
        hook.remove()
    return recorder.losses, stopped
