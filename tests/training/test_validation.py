"""Validation: its loss, which weights it chooses, and what is said of it before a run publishes."""

import json
import math
from dataclasses import replace

import pytest
import torch
from accelerate import Accelerator

from finetune.assemble.batches import Batches
from finetune.assemble.loading import base_of
from finetune.assemble.rows import examples_of
from finetune.errors import TrainingError
from finetune.evaluation.predict import Predictor
from finetune.evaluation.scores import Scores, Value
from finetune.evaluation.validation import BaseAlone, Validator, warnings_of, worse_than_base
from finetune.metrics.exact_match import ExactMatch
from finetune.objectives.weighted import Weighted
from finetune.runs.train import train
from finetune.training.state import TrainState
from finetune.training.validation import Validation

NAN = float("nan")
BASE_BEATEN, BASE_RIGHT = (BaseAlone(split="test", all_right=right) for right in (False, True))


def validator_of(base, objective, examples, batches):
    predictor = Predictor(
        model=base.model,
        task=objective.task,
        prompt_batch=batches.prompt_batch,
        batch_size=4,
        accelerator=Accelerator(cpu=True),
    )
    return Validator(
        predictor=predictor,
        objective=objective,
        examples=examples,
        training_batch=batches.training_batch,
        seed=0,
    )


@pytest.fixture
def validator(build, tiny_base):
    run = build(tiny_base)
    run.base.model.eval()
    return validator_of(run.base, run.trainer.objective, run.examples, run.base.collator)


def test_the_loss_is_a_mean_over_supervised_tokens_whatever_the_batches(validator):
    """The reference computes all logits of each row by itself."""
    total, count = 0.0, 0
    for example in validator.examples:
        batch = validator.training_batch([(example, True)])
        with torch.no_grad():
            logits = validator.predictor.model(**batch.inputs).logits[0, :-1]  # [T - 1, V]
        labels = batch.labels[0, 1:]
        total += torch.nn.functional.cross_entropy(logits, labels, ignore_index=-100, reduction="sum").item()
        count += int((labels != -100).sum())
    for batch_size in (1, 4, 32):
        assert validator.loss(batch_size) == pytest.approx(total / count, abs=2e-5)


def test_the_loss_of_several_objectives_is_their_weighted_sum(validator):
    own = validator.objective.objective
    twice = replace(validator.objective, objective=Weighted({"a": (0.5, own), "b": (3.0, own)}))
    assert replace(validator, objective=twice).loss(4) == pytest.approx(3.5 * validator.loss(4), abs=4e-6)


def test_the_loss_leaves_nothing_behind(validator):
    validator.loss(4)
    assert all(parameter.grad is None for parameter in validator.predictor.model.parameters())


def test_a_loss_that_is_not_finite_is_none(validator):
    class Spoiled:
        couples_rows = False

        def terms(self, model, batch):
            terms = validator.objective.terms(model, batch)
            return {name: replace(term, loss_sum=term.loss_sum * NAN) for name, term in terms.items()}

    assert replace(validator, objective=Spoiled()).loss(4) is None


def test_images_are_held_against_their_own_labels_only(make_recipe, tiny_clip):
    """Rows of one label in a batch, as sorted data has them, must not look alike to the loss."""
    text = {"name": "contrastive", "text_template": "a photo of {label}"}
    recipe = make_recipe(tiny_clip, task=text, method={"towers": {"language": "all-linear"}})
    base = base_of(recipe)
    examples = examples_of(recipe, "val", base=base)
    objective, batches = base.objective(base.task(recipe.task)), Batches(base.collator, None)
    losses = []
    for example in examples:
        labels = list(example.choices)
        batch = batches.prompt_batch([example])
        with torch.no_grad():
            chances = base.model(**batch.inputs).logits_per_image[0].log_softmax(dim=0)
        losses.append(-chances[labels.index(example.answers[0])].item())
    found = validator_of(base, objective, examples, batches)
    for batch_size in (1, 2, 32):
        assert found.loss(batch_size) == pytest.approx(sum(losses) / len(losses), abs=1e-4)
    assert 0 < found.loss(4) < math.log(len(examples[0].choices)) + 200


@pytest.mark.parametrize(
    ("before", "after", "better", "as_good"),
    [
        ((None, None), (0.0, 1.0), True, False),
        ((0.5, 1.0), (0.6, 9.0), True, False),
        ((0.5, 1.0), (0.4, 0.1), False, False),
        ((0.5, 1.0), (0.5, 0.9), True, False),
        ((0.5, 1.0), (0.5, 1.1), False, False),
        ((0.5, 1.0), (0.5, 1.0), False, True),
        ((0.5, None), (0.5, 1.0), True, False),
        ((0.5, 1.0), (0.5, None), False, False),
        ((0.5, None), (0.5, None), False, True),
    ],
)
def test_the_score_decides_then_the_loss_then_the_step(before, after, better, as_good):
    validation = Validation(values={"exact_match": after[0]}, loss=after[1])
    assert validation.is_better(*before) is better and validation.is_as_good(*before) is as_good


def test_where_less_is_better_the_lower_score_wins():
    error = Validation(values={"error": 0.4, "exact_match": 0.1}, loss=1.0, higher_is_better=False)
    assert (error.metric, error.score) == ("error", 0.4)
    assert error.is_better(0.5, 0.1) and not error.is_better(0.3, 9.0) and error.is_better(0.4, 1.1)
    state = TrainState(batch_size=4, step=10)
    worse = Validation(values={"error": 0.5}, loss=1.0, higher_is_better=False)
    assert [state.note(one) for one in (error, worse)] == [True, False]


@pytest.mark.parametrize(
    ("losses", "best", "steps"),
    [((3.0, 2.0, 1.0), 6, 6), ((3.0, 1.0, 2.0), 4, 6), ((2.0, 2.0, 2.0), 6, 6)],
)
def test_where_no_answer_is_ever_right_the_loss_chooses(build, tiny_fast_vlm, losses, best, steps):
    run, left = build(tiny_fast_vlm, max_steps=6, eval_steps=2), iter(losses)
    state = run.trainer.train(run.examples, validate=lambda: Validation(values={"exact_match": 0.0}, loss=next(left)))
    assert (state.best_step, state.step, state.best_loss) == (best, steps, min(losses))
    assert state.validations == [[2, 0.0, losses[0]], [4, 0.0, losses[1]], [6, 0.0, losses[2]]]
    assert [(line["val.loss"], line["best"]) for line in run.lines() if "val.loss" in line][0] == (losses[0], True)


def test_a_checkpoint_of_an_earlier_release_goes_on(build, tiny_fast_vlm):
    """It has no losses: a score that is equal to its best is then better for having one."""
    run = build(tiny_fast_vlm, max_steps=4, eval_steps=2)
    with pytest.raises(StopIteration):
        left = iter([Validation(values={"exact_match": 0.5}, loss=1.0)])
        run.trainer.train(run.examples, validate=lambda: next(left))
    checkpoint = run.checkpoints.newest(print)
    old = {k: v for k, v in checkpoint.facts["state"].items() if k not in ("best_loss", "validations")}
    again = build(tiny_fast_vlm, max_steps=4, eval_steps=2)
    again.trainer.restore(replace(checkpoint, facts={**checkpoint.facts, "state": old}))
    assert (again.trainer.state.best_score, again.trainer.state.best_loss) == (0.5, None)
    state = again.trainer.train(again.examples, validate=lambda: Validation(values={"exact_match": 0.5}, loss=7.0))
    assert (state.best_step, state.best_loss, state.validations) == (4, 7.0, [[4, 0.5, 7.0]])


def ended(*validations, best, step=None):
    (_, score, loss) = next(one for one in validations if one[0] == best)
    return TrainState(
        batch_size=4, step=step or validations[-1][0], best_score=score, best_loss=loss, best_step=best,
        validations=[list(one) for one in validations],
    )  # fmt: skip


@pytest.mark.parametrize(
    ("state", "base", "expected"),
    [
        (ended((5, 0.5, 2.0), (10, 0.7, 1.0), best=10), None, ["the validation score was still rising at the end, from "
         "0.500 to 0.700. To continue from here, run the recipe with a larger train.max_steps and "
         "train.resume=extend"]),
        (ended((5, 0.5, 2.0), (10, 0.5, 1.0), best=10), None, []),
        (ended((5, 0.7, 2.0), (10, 0.5, 1.0), best=5), None, []),
        (ended((5, 0.5, 2.0), (8, 0.7, 1.0), best=8), None, []),  # it ended early
        (ended((10, 0.5, 2.0), best=10), None, []),
        (ended((10, 0.5, 2.0), best=10), BASE_BEATEN, []),
        (ended((10, 1.0, 2.0), best=10), BASE_RIGHT, ["the base alone answers every test row correctly, so these "
         "rows cannot show an improvement. Use harder rows"]),
        (TrainState(batch_size=4, step=10), None, []),
    ],
)  # fmt: skip
def test_what_should_be_known(make_recipe, state, base, expected):
    options = make_recipe("no-base").train
    assert warnings_of(state, options, total_steps=10, base=base) == expected


@pytest.mark.parametrize(
    ("before", "after", "higher_is_better", "warned"),
    [(1.0, 0.875, True, True), (0.5, 0.5, True, False), (0.5, 0.6, True, False), (1.0, 2.0, False, True),
     (2.0, 1.0, False, False), (None, 1.0, True, False)],
)  # fmt: skip
def test_an_adapter_that_is_worse_than_the_base(before, after, higher_is_better, warned):
    def scores(value):
        one = Value(value=value, interval=None, n=8, unit=None, higher_is_better=higher_is_better)
        return Scores(values={"exact_match": one}, baselines={}, by_question_type={}, n=8, truncated=0)

    base = Scores(values={}, baselines={}, by_question_type={}, n=8, truncated=0) if before is None else scores(before)
    message = f"the adapter is worse than the base alone on the test rows: exact match {after:.3f}, the base "
    found = worse_than_base(base, scores(after))
    assert len(found) == warned and all(text.startswith(message) for text in found)


def test_an_error_that_still_falls_gets_a_warning_and_a_perfect_one_does_not(make_recipe):
    options = make_recipe("no-base").train
    falling = ended((5, 0.7, 2.0), (10, 0.5, 1.0), best=10)
    (warning,) = warnings_of(falling, options, total_steps=10, base=None, higher_is_better=False)
    assert warning.startswith("the validation score was still falling at the end, from 0.700 to 0.500. To con")
    perfect = ended((5, 0.0, 2.0), (10, 0.0, 1.0), best=10)
    assert warnings_of(perfect, options, total_steps=10, base=None, higher_is_better=False) == []


def test_a_metric_without_a_value_chooses_nothing(validator, monkeypatch):
    monkeypatch.setattr(ExactMatch, "row", lambda self, prediction, example: None)
    with pytest.raises(
        TrainingError, match=r"exact_match must have a value for a validation row, .*, but it has none for \d+ rows"
    ):
        validator(batch_size=4)


def test_a_run_without_a_right_answer_warns_before_it_publishes(make_recipe, tiny_fast_vlm, capfd):
    result = train(make_recipe(tiny_fast_vlm, train={"max_steps": 4, "eval_steps": 2, "learning_rate": 1e-4}))
    assert result.metrics["test"].first.value == 0, "this recipe learns too little"
    zero, falling = result.warnings
    assert zero.startswith("every validation scored 0: no answer was correct at any step. The weights of step 4 were ")
    assert falling.startswith("the validation loss was still falling at the end, from ")
    out, err = capfd.readouterr()
    assert out.index(f"warning: {zero}.") < out.index(f"published {result.ref}")
    assert json.loads((result.folder / "result.json").read_text())["warnings"] == [zero, falling]
    assert "evaluating the base, with blank images" in err and "training:" in err and "validation loss:" in err
    lines = [json.loads(line) for line in (result.folder / "log.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines if "loss" in line] == [1, 2, 3, 4], "a short run logs every step"
    losses = [line["val.loss"] for line in lines if "val.loss" in line]
    assert len(losses) == 2 and losses[1] < losses[0]


@pytest.mark.parametrize("split", ["test", "val"])
def test_a_base_that_is_right_already_is_named(make_recipe, tiny_fast_vlm, monkeypatch, rows_folder, split):
    monkeypatch.setattr(ExactMatch, "row", lambda self, prediction, example: 1.0)
    recipe = make_recipe(tiny_fast_vlm, **({} if split == "test" else {"data": {"test": None}}))
    (warning,) = train(recipe).warnings
    name = {"test": "test", "val": "validation"}[split]
    assert warning == (
        f"the base alone answers every {name} row correctly, so these rows cannot show an improvement. Use harder rows"
    )
