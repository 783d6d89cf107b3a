"""The regression against scikit-learn's, and the choice of its penalty against all fits."""

import numpy as np
import pytest
import torch
from sklearn.linear_model import LogisticRegression
from sklearn.preprocessing import StandardScaler

from finetune.evaluation.logistic_regression import PENALTIES, choose_penalty, fit


def problem(seed, *, rows=120, features=8, classes=3, noise=2.0):
    """Return overlapping classes, in features of very different sizes of which one is constant."""
    rng = np.random.default_rng(seed)
    labels = np.concatenate([np.arange(classes), rng.integers(0, classes, rows - classes)])
    x = rng.normal(size=(classes, features))[labels] + noise * rng.normal(size=(rows, features))
    x = x * 10.0 ** rng.uniform(-2, 2, features) + rng.normal(size=features)
    x[:, 0] = 3.0
    return torch.from_numpy(x), torch.from_numpy(labels)


@pytest.mark.parametrize("penalty", [1.0, 0.01, 0.0001])
@pytest.mark.parametrize("classes", [2, 3, 7])
@pytest.mark.parametrize(("rows", "features"), [(120, 8), (40, 90)], ids=["tall", "wide"])
def test_the_probabilities_are_those_of_scikit_learn(rows, features, classes, penalty):
    everything, labels = problem(classes, rows=rows + 50, features=features, classes=classes)
    x, labels = everything[:rows], labels[:rows]
    found = fit(x, labels, num_classes=classes, penalty=penalty)
    scaler = StandardScaler().fit(x.numpy())
    # Its model of two classes has one vector of weights w in the place of w / 2 and - w / 2.
    strength = (2 if classes == 2 else 1) / (penalty * rows)
    theirs = LogisticRegression(C=strength, tol=1e-10, max_iter=100_000)
    theirs.fit(scaler.transform(x.numpy()), labels.numpy())
    wanted = theirs.predict_proba(scaler.transform(everything.numpy()))
    np.testing.assert_allclose(found.probabilities(everything).numpy(), wanted, rtol=0, atol=1e-4)


def test_a_fit_is_the_same_each_time_and_from_another_start():
    x, labels = problem(0)
    one, other = (fit(x, labels, num_classes=3, penalty=0.01) for _ in range(2))
    assert torch.equal(one.weight, other.weight) and torch.equal(one.bias, other.bias)
    weak = fit(x, labels, num_classes=3, penalty=0.0001)
    warm = fit(x, labels, num_classes=3, penalty=0.01, start=weak)
    assert not torch.allclose(weak.weight, one.weight, atol=1e-2)
    torch.testing.assert_close(warm.probabilities(x), one.probabilities(x), rtol=0, atol=1e-5)


def test_a_class_without_a_row_is_never_the_most_probable():
    x, labels = problem(0, classes=2)
    found = fit(x, labels, num_classes=3, penalty=0.01).probabilities(x)
    assert found.isfinite().all() and found[:, 2].max() < 1e-3


def test_the_penalty_is_that_of_most_right_rows():
    x, labels = problem(1, rows=400, features=60, classes=4, noise=3.0)
    parts = x[:100], labels[:100], x[100:], labels[100:]
    right = {}
    for penalty in PENALTIES:
        found = fit(x[:100], labels[:100], num_classes=4, penalty=penalty)
        right[penalty] = int((found.probabilities(x[100:]).argmax(dim=1) == labels[100:]).sum())
    assert len({*right.values()}) > 3, "the penalty matters here"
    assert right[choose_penalty(*parts, num_classes=4)] == max(right.values())


def test_without_other_rows_the_penalty_is_the_middle_one():
    x, labels = problem(0)
    assert choose_penalty(x, labels, x[:0], labels[:0], num_classes=3) == 0.01
