"""Multinomial logistic regression with an L2 penalty, fitted to all rows at once: no draw decides anything.

Legend of shapes: N rows, D features, K classes.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch.nn.functional import cross_entropy, linear

if TYPE_CHECKING:
    from torch import Tensor

PENALTIES = (1.0, 0.3, 0.1, 0.03, 0.01, 0.003, 0.001, 0.0003, 0.0001)  # the strongest first
_PATIENCE = 3  # weaker penalties that are tried after the best one
_ITERATIONS = 2000  # the largest number of L-BFGS iterations
_ROUGH = 1e-4  # the largest entry of the gradient that ends a fit to compare penalties
_FULL = 3e-5  # of the result, as a share of the penalty: the distance to the best weights is at most gradient / penalty


@dataclass(frozen=True, kw_only=True)
class LogisticRegression:
    """A fitted regression, for features that it standardizes as those of its own rows.

    Attributes:
        mean: the mean of each feature, [D].
        scale: the standard deviation of each feature, 1 for a constant one, [D].
        weight: the weights of standardized features, [K, D].
        bias: the bias of each class, [K].
    """

    mean: Tensor
    scale: Tensor
    weight: Tensor
    bias: Tensor

    def logits(self, features: Tensor) -> Tensor:
        """Return [N, K] of features [N, D]."""
        return linear((features - self.mean) / self.scale, self.weight, self.bias)

    def probabilities(self, features: Tensor) -> Tensor:
        """Return the probability of each class, [N, K], for features [N, D]."""
        return self.logits(features).softmax(dim=1)


def fit(
    features: Tensor,
    labels: Tensor,
    *,
    num_classes: int,
    penalty: float,
    start: LogisticRegression | None = None,
    tolerance: float | None = None,
) -> LogisticRegression:
    """Return the regression with the least mean cross-entropy + penalty / 2 x the sum of its squared weights.

    The biases have no penalty. For three classes or more this is scikit-learn's ``LogisticRegression`` on standardized
    features with C = 1 / (penalty x N); for two classes, where that has one vector of weights, with C twice as large.

    Args:
        features: [N, D] in float64.
        labels: the number of each row's class, [N].
        num_classes: K; a class may have no row.
        penalty: the strength of the penalty, above 0.
        start: a regression of the same rows, to start from; by default all weights are 0.
        tolerance: the largest absolute value of the gradient at the end; by default a small share of the penalty.
    """
    tolerance = tolerance or _FULL * penalty
    mean, scale = features.mean(dim=0), features.std(dim=0, correction=0)
    scale = torch.where(scale > 0, scale, 1.0)
    standardized = (features - mean) / scale
    shape = (num_classes, features.shape[1])
    weight = (start.weight.clone() if start else features.new_zeros(shape)).requires_grad_()
    bias = (start.bias.clone() if start else features.new_zeros(num_classes)).requires_grad_()
    optimizer = torch.optim.LBFGS(
        [weight, bias],
        max_iter=_ITERATIONS,
        tolerance_grad=tolerance,
        tolerance_change=tolerance * 1e-6,
        line_search_fn="strong_wolfe",
    )

    def loss() -> Tensor:
        optimizer.zero_grad()
        value = cross_entropy(linear(standardized, weight, bias), labels) + penalty / 2 * weight.square().sum()
        value.backward()
        return value

    with torch.enable_grad():
        optimizer.step(loss)
    return LogisticRegression(mean=mean, scale=scale, weight=weight.detach(), bias=bias.detach())


def choose_penalty(
    features: Tensor, labels: Tensor, held_features: Tensor, held_labels: Tensor, *, num_classes: int
) -> float:
    """Return the penalty of ``PENALTIES`` whose regression is right on most rows that it was not fitted to.

    Of equal penalties the one with the lower cross-entropy is chosen, and then the stronger one.

    Args:
        features: the features of the rows to fit, [N, D].
        labels: their classes, [N].
        held_features: the features of other rows, [M, D]; without any, the penalty in the middle is returned.
        held_labels: their classes, [M].
        num_classes: K.
    """
    if not len(held_labels):
        return PENALTIES[len(PENALTIES) // 2]
    best, chosen, waited = None, PENALTIES[0], 0
    found = None
    for penalty in PENALTIES:
        found = fit(features, labels, num_classes=num_classes, penalty=penalty, start=found, tolerance=_ROUGH)
        logits = found.logits(held_features)
        score = (int((logits.argmax(dim=1) == held_labels).sum()), -float(cross_entropy(logits, held_labels)))
        if best is None or score > best:
            best, chosen, waited = score, penalty, 0
        elif (waited := waited + 1) == _PATIENCE:
            break
    return chosen
