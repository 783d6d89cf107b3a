"""The metric accuracy: 1 if the predicted label is that of the row, else 0."""

from finetune.metrics.exact_match import ExactMatch


class Accuracy(ExactMatch):
    """Accuracy: the share of rows whose label, the one with the highest score, is right."""

    key = "accuracy"
