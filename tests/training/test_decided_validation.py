"""A validation that ends once it can no longer be the best chooses the same weights as one that sees all rows."""

import json
import random
from dataclasses import dataclass, field

import pytest

from finetune.core.example import Example, answer, ask
from finetune.core.prediction import Text
from finetune.errors import RecipeError
from finetune.evaluation.validation import Validator, warnings_of
from finetune.metrics.exact_match import ExactMatch
from finetune.plugins import register
from finetune.preflight.run import check_recipe
from finetune.runs.train import train
from finetune.tasks.vqa import VqaConfig
from finetune.training.log import RunLog
from finetune.training.state import TrainState
from finetune.training.validation import DecidedValidation

ROWS = [Example(id=str(i), messages=[*ask("?"), answer("yes")], media=(), answers=["yes"]) for i in range(40)]


class Wrong:
    """The share of wrong rows; rows whose answer is empty have no value."""

    key, unit, higher_is_better, best_value = "wrong", None, False, 0.0

    def __init__(self, options):
        pass

    def row(self, prediction, example):
        return None if not prediction.text else float(prediction.text != "yes")


class Unbounded(Wrong):
    key, best_value = "unbounded", None


@dataclass
class Scripted:
    """A predictor whose answers are given."""

    answers: list[str]
    metric: str
    batch_size: int = 4
    process: tuple[int, int] = (0, 1)
    predicted: list[str] = field(default_factory=list)

    @property
    def task(self):
        class Task:
            options = VqaConfig(metrics=[self.metric])

        return Task

    def __call__(self, examples, *, title):
        self.predicted += [example.id for example in examples]
        return [Text(text=self.answers[int(example.id)]) for example in examples]


@pytest.fixture(autouse=True)
def metrics(monkeypatch):
    monkeypatch.setattr(Validator, "loss", lambda self, batch_size: 1.0)
    for metric in (Wrong, Unbounded):
        register("metrics", metric.key, metric)


def validations(runs, metric, *, ends):
    """Validate one set of answers after the other, and return the state and the numbers of predicted rows."""
    state, counts = TrainState(batch_size=4), []
    for answers in runs:
        state.step += 1
        predictor = Scripted(answers, metric)
        validator = Validator(
            predictor=predictor, objective=None, examples=ROWS, training_batch=None, seed=0, ends_when_decided=ends
        )
        state.note(validator(batch_size=4, best=state.best_score))
        assert len(set(predictor.predicted)) == len(predictor.predicted)
        counts.append(len(predictor.predicted))
    return state, counts


@pytest.mark.parametrize("metric", ["exact_match", "wrong"])
@pytest.mark.parametrize("seed", range(20))
def test_the_choice_is_the_same(metric, seed):
    draw = random.Random(seed)
    words = ["yes", "no", ""] if metric == "wrong" else ["yes", "no"]
    runs = []
    for _ in range(6):
        share = draw.random()
        runs.append(["yes" if draw.random() < share else draw.choice(words) for _ in ROWS])
    (plain, all_rows), (early, fewer) = (validations(runs, metric, ends=ends) for ends in (False, True))
    chosen = ("best_score", "best_loss", "best_step", "validations_without_better")
    assert [getattr(early, name) for name in chosen] == [getattr(plain, name) for name in chosen]
    known = [
        (one, other) for one, other in zip(early.validations, plain.validations, strict=True) if one[1] is not None
    ]
    assert all(one == other for one, other in known)
    ended = [count for one, count in zip(early.validations, fewer, strict=True) if one[1] is None]
    assert set(all_rows) == {40} and all(count < 40 for count in ended)


def test_a_validation_that_all_rows_fail_ends_at_the_first_part_that_decides():
    good, bad = ["yes"] * 30 + ["no"] * 10, ["no"] * 40
    state, counts = validations([good, bad, good], "exact_match", ends=True)
    assert counts == [40, 15, 40]  # parts of 5; after 10 wrong rows it could still be equal
    assert state.validations == [[1, 0.75, 1.0], [2, None, None], [3, 0.75, 1.0]]
    assert (state.best_step, state.validations_without_better) == (3, 2)


def test_the_last_warning_knows_no_score_of_a_validation_that_ended(make_recipe):
    state = TrainState(
        batch_size=4, step=3, best_score=0.8, best_loss=1.0, best_step=3,
        validations=[[1, 0.7, 1.0], [2, None, None], [3, 0.8, 1.0]],
    )  # fmt: skip
    (found,) = warnings_of(state, make_recipe("no-base").train, total_steps=3, base=None)
    assert found.startswith("the validation score was still rising at the end, to 0.800.")


@pytest.mark.parametrize("metric", ["unbounded", "wrong"])
def test_the_metric_must_state_its_best_value(make_recipe, tiny_base, metric):
    recipe = make_recipe(tiny_base, task={"metrics": [metric]}, train={"end_decided_validations": True})
    if metric == "wrong":
        return check_recipe(recipe)
    with pytest.raises(
        RecipeError, match=r"must state a best_value of its rows, but unbounded states none\. Set it to"
    ):
        check_recipe(recipe)
    check_recipe(replace_off(recipe))
    return None


def replace_off(recipe):
    return recipe.model_copy(update={"train": recipe.train.model_copy(update={"end_decided_validations": False})})


def test_a_run_ends_decided_validations(make_recipe, tiny_base, monkeypatch, capsys):
    validated = []
    write = RunLog.validation

    def note(self, step, validation, *, best):
        validated.append(validation)
        write(self, step, validation, best=best)

    monkeypatch.setattr(RunLog, "validation", note)
    monkeypatch.setattr(ExactMatch, "row", lambda self, prediction, example: float(not validated))
    options = {"max_steps": 4, "eval_steps": 2, "eval_batch_size": 1, "end_decided_validations": True}
    result = train(make_recipe(tiny_base, train=options))
    first, second = validated
    assert first.score == 1 and isinstance(second, DecidedValidation) and second.num_rows < second.of
    lines = [json.loads(line) for line in (result.folder / "log.jsonl").read_text().splitlines()]
    assert [line for line in lines if "val.rows" in line] == [{"step": 4, "val.rows": second.num_rows, "best": False}]
    text = (
        f"step 4: validation ended after {second.num_rows} of {second.of} rows: exact match can no longer reach 1.000"
    )
    assert text in capsys.readouterr().out
