"""Metrics of classification are those of scikit-learn."""

import warnings

import numpy as np
import pytest
from sklearn.metrics import accuracy_score, balanced_accuracy_score, f1_score, roc_auc_score, roc_curve

from finetune.core.example import Example
from finetune.core.prediction import Label, Number, Text
from finetune.errors import DataError, RecipeError
from finetune.evaluation.measured import Measured
from finetune.plugins import find
from finetune.tasks.classify import ClassifyConfig

NAMES = ["accuracy", "balanced_accuracy", "macro_f1", "auroc", "recall_at_fpr"]
LABELS = ["ant", "Bee", "cat", "dog", "Emu", "fox"]


def metric(name, **options):
    section = ClassifyConfig(name="classify", labels=LABELS, positive_label="ant", **options)
    return find("metrics", name, what="metric")(section)


def example(i, *answers):
    return Example(id=str(i), messages=[], media=(), answers=list(answers))


def case(seed):
    """The true labels, the scores [N, labels] and the predicted labels of some rows; scores are often equal."""
    rng = np.random.default_rng(seed)
    labels = LABELS[: rng.integers(2, len(LABELS) + 1)]
    rows = rng.integers(2, 40)
    true = rng.choice(len(labels), rows, p=rng.dirichlet(np.ones(len(labels))))
    scores = rng.dirichlet(np.ones(len(labels)), rows) + rng.uniform(0, 1) * np.eye(len(labels))[true]
    if seed % 2:
        scores = scores.round(1)
    return labels, true, scores, scores.argmax(axis=1)


def values(labels, true, scores, predicted, name):
    predictions = [
        Label(label=labels[p].upper(), scores=dict(zip(labels, row.tolist(), strict=True)))
        for p, row in zip(predicted, scores, strict=True)
    ]
    measured = Measured([metric(name)], [example(i, labels[t]) for i, t in enumerate(true)], predictions)
    return measured.values().get(name)


def reference(labels, true, scores, predicted, name):
    """The value by scikit-learn; None where it has none."""
    if name == "accuracy":
        return accuracy_score(true, predicted)
    if name == "balanced_accuracy":
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # about predicted labels that no row has
            return balanced_accuracy_score(true, predicted)
    if name == "macro_f1":
        return f1_score(true, predicted, average="macro")
    mixed = [i for i in range(len(labels)) if 0 < (true == i).sum() < len(true)]
    if name == "auroc":
        return np.mean([roc_auc_score(true == i, scores[:, i]) for i in mixed]) if mixed else None
    if 0 not in mixed:
        return None
    rates, recalls, _ = roc_curve(true == 0, scores[:, 0], drop_intermediate=False)
    return recalls[rates <= 0.05 + 1e-9].max()


@pytest.mark.parametrize("name", NAMES)
def test_a_thousand_random_cases_are_those_of_scikit_learn(name):
    found = 0
    for seed in range(1000):
        given = case(seed)
        value, wanted = values(*given, name), reference(*given, name)
        assert (value is None) == (wanted is None), seed
        if value is not None:
            assert value.value == pytest.approx(wanted, abs=1e-6), seed
            found += 1
    assert found > 500


def test_auroc_is_the_macro_mean_of_scikit_learn():
    rng = np.random.default_rng(0)
    true = np.arange(60) % 4
    scores = rng.dirichlet(np.ones(4), 60)
    value = values(LABELS[:4], true, scores, scores.argmax(axis=1), "auroc")
    assert value.value == pytest.approx(roc_auc_score(true, scores, multi_class="ovr", average="macro"), abs=1e-9)


def test_a_value_that_no_row_defines_is_left_out():
    rows = [example(i, "ant") for i in range(3)]
    one = [Label(label="ant", scores={"ant": 1.0})] * 3
    found = Measured([metric(name) for name in NAMES], rows, one).values(interval=True)
    assert found.keys() == {"accuracy", "balanced_accuracy", "macro_f1"}
    # One of two rows has another label, so some draws hold one label alone.
    mixed = Measured([metric("auroc")], [example(0, "ant"), example(1, "cat")], one[:2]).values(interval=True)
    assert mixed["auroc"].value == 0.5 and mixed["auroc"].interval == (0.5, 0.5)


def test_labels_are_compared_under_the_normalization_and_any_reference_counts():
    rows = [example(0, "Bee", "wasp"), example(1, "cat"), example(2, "-5")]
    said = [Text(text=" WASP"), Text(text="bee"), Text(text="−5.0")]
    exact = [metric(name).corpus(said, rows) for name in ("balanced_accuracy", "macro_f1")]
    assert exact[0] == pytest.approx(1 / 3)
    found = metric("balanced_accuracy", answer_normalization="number").corpus(said, rows)
    assert found == pytest.approx(2 / 3)


def test_predictions_of_another_kind_are_refused():
    with pytest.raises(DataError, match=r"macro_f1 needs a text or a label, got a prediction of type number \(row 0\)"):
        metric("macro_f1").corpus([Number(value=1.0)], [example(0, "ant")])
    with pytest.raises(DataError, match=r"auroc needs labels with scores, got a prediction of type text \(row 0\)"):
        metric("auroc").corpus([Text(text="ant")], [example(0, "ant")])
    with pytest.raises(RecipeError, match=r"recall_at_fpr needs task\.positive_label, got none"):
        find("metrics", "recall_at_fpr", what="metric")(ClassifyConfig(name="classify"))


def test_the_false_positive_rate_bounds_the_others_that_count():
    rows = [example(i, "ant" if i < 4 else "cat") for i in range(8)]
    scores = [0.9, 0.7, 0.5, 0.3, 0.8, 0.6, 0.4, 0.2]
    given = [Label(label="ant", scores={"ant": score}) for score in scores]
    for rate, wanted in ((0.0, 0.25), (0.2, 0.25), (0.25, 0.5), (0.5, 0.75), (1.0, 1.0)):
        assert metric("recall_at_fpr", false_positive_rate=rate).corpus(given, rows) == wanted
