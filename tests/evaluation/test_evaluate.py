"""Scores, baselines and rows against values worked out by hand."""

from collections import Counter
from types import SimpleNamespace

import numpy as np
import pytest

from finetune.core.example import Example, answer, as_images, ask
from finetune.core.prediction import Number, Text
from finetune.errors import DataError
from finetune.evaluation.cells import cells
from finetune.evaluation.evaluate import Evaluation, evaluate_rows, score
from finetune.evaluation.measured import Measured
from finetune.evaluation.predict import Predictor, blanked
from finetune.evaluation.report import samples_of
from finetune.evaluation.rows import make_rows
from finetune.evaluation.scores import Scores
from finetune.metrics.building import metrics_of
from finetune.metrics.exact_match import ExactMatch
from finetune.metrics.names import named_values
from finetune.metrics.statistics import bootstrap_interval
from finetune.tables import METRICS
from finetune.tasks.vqa import VqaConfig, VqaTask

GREY = np.full((8, 8, 3), 99, np.uint8)


class Length:
    """How many letters the answer is off; a row whose reference is ``?`` has no value."""

    key, unit, higher_is_better = "length", "letters", False

    def __init__(self, options):
        pass

    def row(self, prediction, example):
        return None if example.answers[0] == "?" else float(abs(len(str(prediction)) - len(example.answers[0])))


class Vocabulary:
    """The number of different predictions: of all rows together, and of none alone."""

    key, unit, higher_is_better = "vocabulary", None, True

    def __init__(self, options):
        pass

    def corpus(self, predictions, examples):
        return len({str(prediction) for prediction in predictions})


@pytest.fixture
def toys(monkeypatch):
    monkeypatch.setitem(METRICS, "length", f"{__name__}:Length")
    monkeypatch.setitem(METRICS, "vocabulary", f"{__name__}:Vocabulary")


def row(i, *answers, of="all", image=None, images=()):
    return Example(
        id=str(i), messages=[*ask(f"q{i}", num_images=len(images)), answer(answers[0])], media=as_images(images),
        answers=list(answers), meta={"question_type": of, "image": image or str(i)},
    )  # fmt: skip


def task(**options):
    return VqaTask(VqaConfig(**options), None)


def predictions(*texts):
    return [Text(text=text) for text in texts]


def measured(task, rows, predictions):
    return Measured(metrics_of(task), rows, predictions)


def scores_of(task, rows, predictions, **blank):
    return score(task, measured(task, rows, predictions), **blank)


def rows_of(task, rows, predictions):
    return make_rows(task, measured(task, rows, predictions))


ROWS = [
    row(0, "Red", of="color", image="a"), row(1, "red", of="color", image="a"), row(2, "blue", of="color"),
    row(3, "yes", "yeah", of="is"), row(4, "no", of="is"),
]  # fmt: skip
PREDICTIONS = [*predictions("red", "blue", "Blue", "yeah"), Text(text="n", finish_reason="length")]


def test_the_scores_of_exact_match():
    scores = scores_of(task(), ROWS, PREDICTIONS, blank_predictions=predictions("red", "red", "red", "no", "no"))
    named = named_values({"test": scores.to_json()})
    assert named == {
        "test.exact_match": 3 / 5, "test.n": 5, "test.truncated": 1,
        "test.majority.exact_match": 3 / 5,  # red is right twice, and one of yes and no once
        "test.blank_image.exact_match": 3 / 5,
        "test.color.exact_match": 2 / 3, "test.color.n": 3, "test.color.truncated": 0,
        "test.color.majority.exact_match": 2 / 3, "test.color.blank_image.exact_match": 2 / 3,
        "test.is.exact_match": 1 / 2, "test.is.n": 2, "test.is.truncated": 1,
        "test.is.majority.exact_match": 1 / 2, "test.is.blank_image.exact_match": 1 / 2,
    }  # fmt: skip
    assert list(scores.by_question_type) == ["color", "is"]
    assert scores.first.interval == bootstrap_interval([True, False, True, True, False], list("aa234"))
    assert (scores.first.n, scores.first.unit, scores.first.higher_is_better) == (5, None, True)


def test_the_scores_of_a_linear_probe_are_those_of_the_rows_that_it_covers(toys):
    probe = [*predictions("red", "red"), None, None, None]
    scores = scores_of(task(metrics=["exact_match", "vocabulary"]), ROWS, PREDICTIONS, probe=probe)
    named = named_values({"test": scores.to_json()})
    assert named["test.linear_probe.exact_match"] == 1.0 and named["test.linear_probe.vocabulary"] == 1.0
    assert named["test.color.linear_probe.exact_match"] == 1.0 and "test.is.linear_probe.exact_match" not in named
    assert scores.beside("linear_probe", "exact_match") == "1.000 on 2 rows"
    assert scores.beside("majority", "exact_match") == "0.600" and scores.beside("blank_image", "exact_match") is None
    assert Scores.from_json(scores.to_json()) == scores
    assert "linear_probe" not in scores_of(task(), ROWS, PREDICTIONS).baselines


def test_the_majority_counts_the_first_reference_of_a_row_alone():
    """As it always did: ``no`` is also allowed for the first row, and is not counted there."""
    rows = [row(0, "yes", "no"), row(1, "no"), row(2, "no")]
    assert scores_of(task(), rows, predictions("x", "x", "x")).baselines["majority"]["exact_match"].value == 2 / 3
    rows = [row(0, "Two"), row(1, "2"), row(2, "three")]
    value = (
        scores_of(task(answer_normalization="vqa"), rows, predictions("x", "x", "x"))
        .baselines["majority"]["exact_match"]
        .value
    )
    assert value == 2 / 3, "what is equal after normalization is counted together"


def test_a_metric_without_a_value_for_a_row_leaves_it_out(toys):
    rows = [row(0, "four", of="a"), row(1, "?", of="a"), row(2, "??", of="b"), row(3, "?", of="c")]
    scores = scores_of(task(metrics=["length", "exact_match"]), rows, predictions("fo", "x", "abcd", "?"))
    assert (scores.first.value, scores.first.n, scores.n) == (2.0, 2, 4), "2 letters off in each of two rows"
    assert list(scores.values) == ["length", "exact_match"] and scores.values["exact_match"].value == 1 / 4
    assert "length" not in scores.by_question_type["c"].values and scores.by_question_type["a"].values["length"].n == 1
    assert str(scores.first) == "2.000 letters"


def test_a_metric_of_all_rows(toys):
    rows = [row(i, "a", of="x" if i < 3 else "y") for i in range(4)]
    scores = scores_of(task(metrics=["vocabulary"]), rows, predictions("a", "b", "b", "c"))
    assert (scores.first.value, scores.first.n) == (3.0, 4)
    assert {name: part.first.value for name, part in scores.by_question_type.items()} == {"x": 2.0, "y": 1.0}
    assert scores.baselines["majority"]["vocabulary"].value == 1.0
    low, high = scores.first.interval
    assert 1 <= low <= high <= 3
    assert [one.right for one in rows_of(task(metrics=["vocabulary"]), rows, predictions("a", "b", "b", "c"))] == [
        None
    ] * 4


def test_a_row_is_right_where_it_is_worth_as_much_as_its_reference(toys):
    rows = [row(0, "four"), row(1, "four"), row(2, "?")]
    found = rows_of(task(metrics=["length"]), rows, predictions("five", "six", "x"))
    assert [(one.values, one.right) for one in found] == [
        ({"length": 0.0}, True), ({"length": 1.0}, False), ({"length": None}, None),
    ]  # fmt: skip


def test_a_line_of_a_file_of_predictions(tmp_path):
    example = row(3, "yes", "yeah", of="is", images=[tmp_path / "a.png"])
    (one,) = rows_of(task(), [example], predictions("yeah"))
    assert one.to_json() == {
        "id": "3", "question_type": "is", "question": "q3", "images": [str(tmp_path / "a.png")],
        "prediction": {"type": "text", "text": "yeah", "finish_reason": "stop"}, "references": ["yes", "yeah"],
        "values": {"exact_match": 1.0}, "right": True,
    }  # fmt: skip
    (one,) = rows_of(task(), [row(0, "x", images=[GREY])], predictions("y"))
    assert one.to_json()["images"] is None and one.to_json()["right"] is False


def test_rows_that_the_adapter_got_wrong_come_first():
    rows = [row(i, "a", images=[GREY]) for i in range(4)]
    scores = scores_of(task(), rows, predictions(*"aaaa"))
    base, adapter = (
        Evaluation(adapter=who, config="c", scores=scores, rows=rows_of(task(), rows, predictions(*texts)))
        for who, texts in (("base", "axxa"), ("adapter", "aaxa"))
    )
    found = samples_of([base, adapter], most=3, wrong_first=["adapter", "base"])
    assert [sample.question for sample in found] == ["q2", "q1", "q0"]
    assert found[1].predictions == {"base": ("x", False), "adapter": ("a", True)}
    assert [sample.question for sample in samples_of([base, adapter], most=9)] == ["q0", "q1", "q2", "q3"]


def test_a_table_has_every_metric_of_its_tasks(toys):
    one, other = (
        Evaluation(adapter="a", config=name, scores=scores_of(task(metrics=metrics), ROWS, PREDICTIONS), rows=())
        for name, metrics in (("x", None), ("y", ["length"]))
    )
    head, lines = cells([one, other])
    assert head == (
        "adapter", "config", "exact match", "95 % interval", "majority", "blank image", "length", "95 % interval",
        "majority", "blank image", "rows",
    )  # fmt: skip
    assert lines[0][2] == "0.600" and lines[0][6:] == ("-", "-", "-", "-", "5")
    assert lines[1][2:7] == ("-", "-", "-", "-", "0.600 letters")


def test_a_table_has_a_column_of_the_linear_probe_if_there_is_one():
    one, other = (
        Evaluation(adapter="a", config="x", scores=scores_of(task(), ROWS, PREDICTIONS, probe=probe), rows=())
        for probe in (PREDICTIONS, None)
    )
    head, lines = cells([one, other])
    assert head[4:] == ("majority", "blank image", "linear probe", "rows")
    assert [line[6] for line in lines] == ["0.600", "-"]


class Counting(Length):
    asked: Counter[tuple[str, str]]

    def row(self, prediction, example):
        self.asked[str(prediction), example.id] += 1
        return 1.0


class EchoTask(VqaTask):
    def predict(self, model, batch):
        return [Text(text=f"{'grey' if (e.images[0] == 128).all() else 'seen'} {e.id}") for e in batch.examples]


class Rows:
    def __init__(self, examples):
        self.examples = examples

    def to(self, device, dtype):
        return self


def test_an_evaluation_measures_each_prediction_once(monkeypatch):
    monkeypatch.setitem(METRICS, "length", f"{__name__}:Counting")
    monkeypatch.setattr(Counting, "asked", Counter(), raising=False)
    rows = [row(i, text, images=[GREY]) for i, text in enumerate("abc")]
    predictor = Predictor(
        model=SimpleNamespace(device="cpu", dtype=None),
        task=EchoTask(VqaConfig(metrics=["length"]), None),
        prompt_batch=Rows,
        batch_size=2,
    )
    scores, found = evaluate_rows(predictor, rows)
    assert [one.values for one in found] == [{"length": 1.0}] * 3 and scores.first.value == 1.0
    once = Counter({(f"{image} {i}", str(i)): 1 for i in range(3) for image in ("seen", "grey")})
    # The majority answer is measured on each row, and so is each row's own reference.
    assert Counting.asked == once + Counter([("a", "0"), ("a", "1"), ("a", "2"), ("a", "0"), ("b", "1"), ("c", "2")])


def test_the_metrics_of_a_task_are_its_own_or_those_that_its_options_name(toys):
    assert [type(metric) for metric in metrics_of(task())] == [ExactMatch]
    assert [metric.key for metric in metrics_of(task(metrics=["vocabulary", "exact_match"]))] == [
        "vocabulary",
        "exact_match",
    ]


def test_exact_match_of_a_prediction_that_is_no_answer_is_refused():
    with pytest.raises(DataError, match=r"needs a text or a label, got a prediction of type number \(row 7"):
        ExactMatch(VqaConfig()).row(Number(value=1.0), row(7, "1"))


def test_grey_images_stand_for_those_of_every_row_with_the_same_prompt():
    same = [row(0, "a", images=[GREY]), row(0, "b", images=[GREY]), row(1, "a", images=[GREY])]
    rows, places = blanked(same)
    assert len(rows) == 2 and places == [0, 0, 1] and (rows[0].images[0] == 128).all()


class FromNumpy(Length):
    def row(self, prediction, example):
        return np.float64(len(str(prediction)))

    def corpus(self, predictions, examples):
        return np.mean([len(str(prediction)) for prediction in predictions])


def test_values_are_pythons_own_numbers(monkeypatch):
    monkeypatch.setitem(METRICS, "length", f"{__name__}:FromNumpy")
    scores = scores_of(task(metrics=["length"]), ROWS, PREDICTIONS)
    found = [
        scores.first.value,
        *scores.first.interval,
        *(part.first.value for part in scores.by_question_type.values()),
    ]
    assert {type(number) for number in found} == {float}
    assert scores.by_question_type["is"].first.interval is None, "an interval of a corpus metric is of all rows alone"
    (first, *_) = rows_of(task(metrics=["length"]), ROWS, PREDICTIONS)
    assert type(first.values["length"]) is float and first.right is True


class NotANumber(Length):
    def row(self, prediction, example):
        return float("nan")


class NoSum(Vocabulary):
    def corpus(self, predictions, examples):
        return float("inf")


@pytest.mark.parametrize(
    ("name", "metric", "message"),
    [
        ("length", "NotANumber", r"the metric length must return a finite number, got nan \(row 0\)"),
        ("vocabulary", "NoSum", r"the metric vocabulary must return a finite number, got inf \(3 rows\)"),
    ],
)
def test_a_value_that_is_no_finite_number_is_refused(name, metric, message, monkeypatch):
    monkeypatch.setitem(METRICS, name, f"{__name__}:{metric}")
    with pytest.raises(DataError, match=message):
        scores_of(task(metrics=[name]), ROWS, PREDICTIONS)


def test_a_prediction_that_is_worth_more_than_its_first_reference_is_right(monkeypatch):
    monkeypatch.setitem(METRICS, "length", f"{__name__}:Consensus")
    (found,) = rows_of(task(metrics=["length"]), [row(0, "a", "b", "b")], predictions("b"))
    assert found.values == {"length": 2 / 3} and found.right is True


class Consensus(Length):
    """The share of references that say the same."""

    higher_is_better = True

    def row(self, prediction, example):
        return example.answers.count(str(prediction)) / len(example.answers)
