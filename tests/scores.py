"""Scores as a run writes them into a manifest, for tests that train nothing."""

from finetune.evaluation.scores import Scores, Value


def scores_json(
    value,
    *,
    metric="exact_match",
    n=40,
    interval=(0.0, 1.0),
    majority=0.5,
    blank_image=0.25,
    question_types=None,
    unit=None,
):
    """Return the JSON of the scores of one metric; ``question_types`` maps a question type to its value."""

    def part(value, by_question_type):
        beside = {"majority": majority, "blank_image": blank_image}
        return Scores(
            values={metric: _value(value, n, interval, unit)},
            baselines={of: {metric: _value(found, n, None, unit)} for of, found in beside.items()},
            by_question_type=by_question_type,
            n=n,
            truncated=0,
        )

    return part(value, {name: part(found, {}) for name, found in (question_types or {}).items()}).to_json()


def _value(value, n, interval, unit):
    return Value(value=value, interval=interval, n=n, unit=unit, higher_is_better=True)
