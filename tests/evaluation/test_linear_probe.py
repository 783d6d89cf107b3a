"""The linear probe on vectors made by hand: the questions that it covers, its predictions, and its warning."""

from dataclasses import replace

import numpy as np
import pytest

from finetune.core.example import Example, answer, as_images, ask
from finetune.core.prediction import Label, Text
from finetune.evaluation import linear_probe
from finetune.evaluation.evaluate import Evaluation, score
from finetune.evaluation.linear_probe import LinearProbe, worse_than_probe
from finetune.evaluation.measured import Measured
from finetune.evaluation.rows import make_rows
from finetune.metrics.building import metrics_of
from finetune.tasks.contrastive import ContrastiveConfig, ContrastiveTask
from finetune.tasks.vqa import VqaConfig, VqaTask

TASK = VqaTask(VqaConfig(), None)
PIXELS = np.zeros((2, 2, 3), np.uint8)


def row(i, question, *answers, of="all", image=True, **changes):
    images = [PIXELS] if image else []
    return Example(
        id=str(i), messages=[*ask(question, num_images=len(images)), answer(answers[0])], media=as_images(images),
        answers=list(answers), meta={"question_type": of, "image": str(i)}, **changes,
    )  # fmt: skip


def colors(count, *, question="color?", start=0):
    return [row(start + i, question, ("Red", "red", "blue")[i % 3]) for i in range(count)]


def by_id(rows):
    """Return vectors [N, 2] that tell apart what ``colors`` tells apart: number 2 of each three is blue."""
    return np.array([[int(one.id) % 3 == 2, int(one.id) % 7 / 7] for one in rows], np.float32)


@pytest.mark.parametrize(
    ("rows", "covered"),
    [
        (colors(10), True),
        (colors(9), False),  # two answers need ten rows
        ([row(i, "q?", "yes") for i in range(20)], False),
        ([row(i, f"q{i}?", "no" if i % 2 else "yes") for i in range(20)], False),  # each question has one row
        ([row(i, "q?", str(i % 201)) for i in range(201 * 5)], False),
        ([row(i, "q?", str(i % 200)) for i in range(200 * 5)], True),
        ([replace(one, media=()) for one in colors(10)], False),
        ([replace(one, captions=["a", "b"]) for one in colors(10)], False),
    ],
    ids=["closed", "few rows", "one answer", "own questions", "201 answers", "200 answers", "no image", "captions"],
)
def test_a_question_is_closed_by_its_train_rows(rows, covered):
    assert bool(LinearProbe(TASK, rows).questions) is covered


def test_it_covers_the_rows_with_an_image_and_a_closed_question():
    probe = LinearProbe(TASK, [*colors(30), *(row(i, "open?", f"text {i}") for i in range(30))])
    test = [*colors(3), row(3, "open?", "text 3"), row(4, "new?", "red"), row(5, "color?", "red", image=False)]
    assert [one.id for one in probe.covered(test)] == ["0", "1", "2"]
    found = probe.predict(test, val=[], vectors=by_id)
    assert found == [Text(text="Red"), Text(text="Red"), Text(text="blue"), None, None, None]


@pytest.mark.parametrize("val", [[], colors(19), colors(21)], ids=["none", "too few", "enough"])
def test_each_question_has_a_classifier_of_its_own(val):
    opposite = [row(100 + i, "opposite?", ("no", "no", "yes")[(100 + i) % 3]) for i in range(30)]
    probe = LinearProbe(TASK, [*colors(30), *opposite])
    test = [*colors(6, start=300), row(300, "opposite?", "no"), row(302, "opposite?", "yes")]
    found = probe.predict(test, val=val, vectors=by_id)
    assert [str(one).lower() for one in found] == ["red", "red", "blue"] * 2 + ["no", "yes"]
    assert probe.predict(test, val=val, vectors=by_id) == found


def test_the_val_rows_choose_the_penalty_where_they_are_enough(monkeypatch):
    held = []

    def choose(features, labels, held_features, held_labels, *, num_classes):
        held.append((len(labels), len(held_labels)))
        return 0.1

    monkeypatch.setattr(linear_probe, "choose_penalty", choose)
    strange = row(99, "color?", "green")  # no train row has this answer
    for count in (20, 19):
        LinearProbe(TASK, colors(60)).predict(colors(1), val=[*colors(count), strange], vectors=by_id)
    (first, (fitted, few)) = held
    assert first == (60, 20)
    assert fitted + few == 60 and 0 < few < 30


def test_rows_about_one_image_are_held_out_together(monkeypatch):
    parts = []

    def choose(features, labels, held_features, held_labels, *, num_classes):
        parts.append(({*features[:, 0].tolist()}, {*held_features[:, 0].tolist()}))
        return 0.1

    monkeypatch.setattr(linear_probe, "choose_penalty", choose)
    rows = [replace(one, meta=one.meta | {"image": str(int(one.id) // 3)}) for one in colors(90)]
    LinearProbe(TASK, rows).predict(
        rows[:1], val=[], vectors=lambda rows: np.array([[int(one.id) // 3] for one in rows], np.float32)
    )
    ((fitted, held),) = parts
    assert held and not fitted & held


def test_rows_about_one_image_alone_are_all_fitted():
    rows = [replace(one, meta=one.meta | {"image": "the same"}) for one in colors(30)]
    found = LinearProbe(TASK, rows).predict(colors(3), val=[], vectors=by_id)
    assert [str(one) for one in found] == ["Red", "Red", "blue"]


def test_many_rows_are_thinned_out_evenly(monkeypatch):
    monkeypatch.setattr(linear_probe, "MOST_ROWS", 20)
    (closed,) = LinearProbe(TASK, colors(70)).questions.values()
    assert [int(one.id) for one in closed.rows] == [int(3.5 * i) for i in range(20)]


def test_the_prediction_of_a_label_has_the_probabilities_as_scores():
    task = ContrastiveTask(ContrastiveConfig(name="contrastive"), None)
    choices = {name: f"a photo of {name}" for name in ("red", "blue", "green")}
    (found,) = LinearProbe(task, colors(30)).predict([replace(colors(3)[2], choices=choices)], val=[], vectors=by_id)
    assert isinstance(found, Label) and found.label == "blue"
    assert found.scores["green"] == 0 and found.scores["blue"] > 0.5 and sum(found.scores.values()) == pytest.approx(1)


def evaluated(rows, texts):
    measured = Measured(metrics_of(TASK), rows, [Text(text=text) for text in texts])
    return Evaluation(adapter="adapter", config="c", scores=score(TASK, measured), rows=make_rows(TASK, measured))


def warnings(rows, adapter, probe):
    found = [None if text is None else Text(text=text) for text in probe]
    return worse_than_probe(evaluated(rows, adapter), found, metrics_of(TASK))


def test_an_adapter_below_the_probe_is_warned_about_on_the_rows_that_both_predict():
    rows = [row(i, "q?", "a") for i in range(100)]
    right, wrong = ["a"] * 50, ["b"] * 50
    assert warnings(rows, [*right, *wrong], [*right, *wrong]) == []
    assert warnings(rows, [*right, *wrong], [*["a"] * 52, *["b"] * 48]) == [], ".02 is not more than .02"
    (text,) = warnings(rows, [*right, *wrong], [*["a"] * 53, *["b"] * 47])
    assert "exact match 0.500 against 0.530 on 100 test rows (all rows that the probe covers)" in text
    assert warnings(rows, [*right, *wrong], [*right, *[None] * 50]) == [], "it is right where the probe is"
    (text,) = warnings(rows, [*right, *wrong], [*[None] * 50, *["a"] * 5, *["b"] * 45])
    assert "exact match 0.000 against 0.100 on 50 test rows" in text
    assert warnings(rows, ["b"] * 100, [None] * 100) == []


def test_a_question_type_below_the_probe_is_named():
    rows = [row(i, "q?", "a", of="color" if i < 90 else "shape\x1b[1m") for i in range(100)]
    (text,) = warnings(rows, [*["a"] * 90, *["b"] * 10], [*["b"] * 9, *["a"] * 91])
    assert "exact match 0.000 against 1.000 on 10 test rows (question type shape" in text
    assert "\x1b" not in text and "covers" not in text and "color" not in text


class Difference:
    key, unit, higher_is_better = "difference", None, False

    def row(self, prediction, example):
        return float(abs(len(str(prediction)) - len(example.answers[0])))


def test_a_smaller_value_may_be_the_better_one(monkeypatch):
    rows = [row(i, "q?", "aa") for i in range(4)]
    found, texts = evaluated(rows, ["a"] * 4), [Text(text="aa")] * 4
    (text,) = worse_than_probe(found, texts, [Difference()])
    assert "difference 1.000 against 0.000" in text
    assert worse_than_probe(evaluated(rows, ["aa"] * 4), [Text(text="a")] * 4, [Difference()]) == []
    monkeypatch.setattr(Difference, "unit", "letters")
    assert worse_than_probe(found, texts, [Difference()]) == [], "the margin is that of a share"
