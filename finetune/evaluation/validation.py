"""Validation during a run: metrics of predictions, a loss of the references, and warnings at the end."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, cast

import torch
from accelerate.utils import gather_object
from tqdm import tqdm

from finetune.errors import TrainingError
from finetune.evaluation.cells import words
from finetune.evaluation.measured import Measured, row_value
from finetune.evaluation.rows import make_rows
from finetune.metrics.building import metrics_of
from finetune.training.validation import DecidedValidation, Validation

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from finetune.core.batch import Batch
    from finetune.core.example import Example
    from finetune.core.prediction import Prediction
    from finetune.evaluation.evaluate import Evaluation
    from finetune.evaluation.predict import Predictor
    from finetune.evaluation.scores import Scores
    from finetune.interfaces import BoundedMetric, LossSum, Metric
    from finetune.recipe import TrainSection
    from finetune.training.log import RunLog
    from finetune.training.state import TrainState
    from finetune.training.step import TaskObjective
    from finetune.training.validation import AnyValidation

_DIGITS = 6  # digits of a loss: sums over other numbers of processes differ in the last bits, which must not decide
_PARTS = 8  # of a validation that may end early
_ROUNDING = 1e-9  # a mean over rows in another order differs by less, relative to the score


@dataclass(frozen=True, kw_only=True)
class Validator:
    """A validator of a model on rows; every process has to call it.

    Attributes:
        predictor: the predictor of the adapted model, which must be in eval mode during a call.
        objective: the objective, with the terms of the loss.
        examples: the rows.
        training_batch: the function that makes a batch with labels from (example, supervised) pairs.
        seed: the seed that chooses one of several captions of a row, as in the first epoch.
        ends_when_decided: whether a validation ends once it can no longer be the best.
    """

    predictor: Predictor
    objective: TaskObjective
    examples: Sequence[Example]
    training_batch: Callable[[list[tuple[Example, bool]]], Batch]
    seed: int
    ends_when_decided: bool = False

    def __call__(self, *, batch_size: int, best: float | None = None) -> AnyValidation:
        """Return the metrics and the loss.

        Args:
            batch_size: the number of rows of a batch with labels, such as the size that fits into memory in training.
            best: the best score so far; None if this is the first validation.

        Raises:
            TrainingError: no row has a value of the metric that chooses the best weights.
        """
        metrics = metrics_of(self.predictor.task)
        first = metrics[0]
        predictions: dict[int, Prediction] = {}
        for part in self._parts(best):
            rows = [self.examples[i] for i in part]
            predictions |= zip(part, self.predictor(rows, title="validating"), strict=True)
            if best is not None and self._is_decided(first, predictions, best):
                return DecidedValidation(metric=first.key, num_rows=len(predictions), of=len(self.examples), best=best)
        measured = Measured(metrics, self.examples, [predictions[i] for i in range(len(self.examples))])
        values = {name: found.value for name, found in measured.values().items()}
        if first.key not in values:
            raise TrainingError(
                f"the metric {first.key} must have a value for a validation row, because it chooses the best weights, "
                f"but it has none for {len(self.examples)} rows. Name another metric first in task.metrics."
            )
        return Validation(values=values, loss=self.loss(batch_size), higher_is_better=first.higher_is_better)

    def _parts(self, best: float | None) -> list[range]:
        """Return the numbers of all rows in the parts between which a validation may end; each is spread over all."""
        count = len(self.examples)
        if not self.ends_when_decided or best is None:
            return [range(count)]
        together = self.predictor.batch_size * self.predictor.process[1]
        parts = max(1, min(_PARTS, count // together))
        return [range(start, count, parts) for start in range(parts)]

    def _is_decided(self, metric: Metric, predictions: Mapping[int, Prediction], best: float) -> bool:
        """Return whether the score would be worse than ``best`` if all rows without a prediction had the best value."""
        num_left = len(self.examples) - len(predictions)
        if not num_left:
            return False
        bounded = cast("BoundedMetric", metric)
        values = [row_value(bounded, prediction, self.examples[i]) for i, prediction in predictions.items()]
        found = [value for value in values if value is not None]
        reachable = (math.fsum(found) + num_left * bounded.best_value) / (len(found) + num_left)
        worse = best - reachable if metric.higher_is_better else reachable - best
        return worse > _ROUNDING * max(1.0, abs(best))

    @torch.no_grad()
    def loss(self, batch_size: int) -> float | None:
        """Return the weighted sum of all terms' means, each over the items of all rows and processes."""
        process, processes = self.predictor.process
        mine = range(process, len(self.examples), processes)
        order = sorted(mine, key=lambda i: (self.examples[i].num_tokens or 0, i))  # similar lengths need less padding
        most = math.ceil(len(self.examples) / processes)  # the same number on every process, as in ``Predictor``
        sums: dict[str, list[float]] = {}
        weights: dict[str, float] = {}
        with tqdm(total=most, unit="row", desc="validation loss", disable=process != 0, leave=False) as bar:
            for start in range(0, most, batch_size):
                rows = order[start : start + batch_size]
                for name, term in self._terms(rows or [0], supervised=bool(rows)).items():
                    weights[name] = term.weight
                    total = sums.setdefault(name, [0.0, 0.0])
                    total[0] += term.loss_sum.item() if rows else 0.0
                    total[1] += term.num_items if rows else 0
                bar.update(len(rows))
        gathered = gather_object([sums]) if processes > 1 else [sums]
        loss = sum(
            weights[name]
            * (math.fsum(one[name][0] for one in gathered) / max(1, sum(one[name][1] for one in gathered)))
            for name in sums
        )
        return round(loss, _DIGITS) if math.isfinite(loss) else None

    def _terms(self, rows: Sequence[int], *, supervised: bool) -> dict[str, LossSum]:
        examples = [self.examples[i].in_epoch(0, seed=self.seed) for i in rows]
        model, objective = self.predictor.model, self.objective
        if objective.couples_rows:
            batch = self.predictor.prompt_batch(examples).to(model.device, model.dtype)
            return {"choice": objective.choice_loss(model, batch)}
        batch = self.training_batch([(example, supervised) for example in examples])
        return objective.terms(model, batch.to(model.device, model.dtype))


@dataclass(frozen=True, kw_only=True)
class BaseAlone:
    """The result of the base alone before training.

    Attributes:
        split: the split that the base was evaluated on, ``test`` or ``validation``.
        all_right: whether all its predictions were right.
    """

    split: str
    all_right: bool


def base_alone(
    predictor: Predictor, val: Sequence[Example], evaluated: Evaluation | None, log: RunLog
) -> BaseAlone | None:
    """Return the result of the base before training: on validation rows if it was not evaluated on test rows.

    Args:
        predictor: the predictor of the base alone.
        val: the validation rows; the base's scores on them are logged if they are used.
        evaluated: the evaluation of the base on the test rows; None if there are none.
        log: the log of the run.
    """
    if evaluated is not None:
        return BaseAlone(split="test", all_right=all(row.right for row in evaluated.rows))
    if not val:
        return None
    measured = Measured(metrics_of(predictor.task), val, predictor(val, title="evaluating the base"))
    for name, value in measured.values().items():
        log.info(f"base on validation: {words(name)} {value}, {value.n} rows")
    return BaseAlone(split="validation", all_right=all(row.right for row in make_rows(predictor.task, measured)))


def warnings_of(
    state: TrainState, options: TrainSection, *, total_steps: int, base: BaseAlone | None, higher_is_better: bool = True
) -> list[str]:
    """Return the warnings that a user should read before a run's adapter is published.

    Args:
        state: the state at the end of the run.
        options: the train section of the recipe.
        total_steps: the number of steps that the run would have taken without early stopping.
        base: the result of the base alone; None if it was not evaluated.
        higher_is_better: whether a larger score is better.
    """
    found = []
    if base is not None and base.all_right:
        found.append(
            f"the base alone answers every {base.split} row correctly, so these rows cannot show an improvement. Use "
            "harder rows"
        )
    if state.validations and higher_is_better and all(score == 0 for _, score, _ in state.validations):
        loss = "" if state.best_loss is None else f" for their validation loss, {state.best_loss:.4f}, the lowest"
        found.append(
            f"every validation scored 0: no answer was correct at any step. The weights of step {state.best_step} were "
            f"chosen{loss}. Compare some answers with their references before you use this adapter"
        )
    if better := _still_better(state, total_steps, higher_is_better=higher_is_better):
        key = "train.epochs" if options.epochs is not None else "train.max_steps"
        found.append(f"{better}. To continue from here, run the recipe with a larger {key} and train.resume=extend")
    return found


def worse_than_base(base: Scores, adapter: Scores) -> list[str]:
    """Return a warning if the adapter has a worse first score than the base alone, else nothing.

    Args:
        base: the scores of the base alone on the test rows.
        adapter: the scores of the adapter on the same rows.
    """
    key = next(iter(adapter.values), "")
    before, after = base.values.get(key), adapter.values.get(key)
    if before is None or after is None or before.value == after.value:
        return []
    if (after.value > before.value) == after.higher_is_better:
        return []
    return [
        f"the adapter is worse than the base alone on the test rows: {words(key)} {after.value:.3f}, the base "
        f"{before.value:.3f}. Compare both in samples.html before you use this adapter"
    ]


def _still_better(state: TrainState, total_steps: int, *, higher_is_better: bool) -> str | None:
    """Return a warning that score or loss was still improving at the end of the full run; None if it was not."""
    if len(state.validations) < 2 or state.best_step != state.step or state.step < total_steps:
        return None
    (_, score_before, loss_before), (_, score, loss) = state.validations[-2:]
    way = "rising" if higher_is_better else "falling"
    if score_before is None:  # that validation ended early, because it was worse than the best before it
        return f"the validation score was still {way} at the end, to {score:.3f}"
    if score != score_before and (score > score_before) == higher_is_better:
        return f"the validation score was still {way} at the end, from {score_before:.3f} to {score:.3f}"
    if score == 0 and higher_is_better and loss is not None and loss_before is not None and loss < loss_before:
        return f"the validation loss was still falling at the end, from {loss_before:.4f} to {loss:.4f}"
    return None
