"""The scores of one model on one set of rows: values by metric, with interval and count, and their JSON form."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, field, fields
from typing import Any

from finetune.core.old_names import SCORES, current_names
from finetune.errors import DataError, plain

_BY = "by_question_type"  # the key of the scores of each question type


@dataclass(frozen=True, kw_only=True)
class Value:
    """The value of one metric.

    Attributes:
        value: the value over all rows that have one.
        interval: the 95 % interval, by the bootstrap over images; None for a baseline.
        n: the number of rows that have a value.
        unit: the unit of the value; None for a share, or a number without a unit.
        higher_is_better: whether a larger value is better.
    """

    value: float
    interval: tuple[float, float] | None
    n: int
    unit: str | None
    higher_is_better: bool

    def __str__(self) -> str:
        return f"{self.value:.3f}" + (f" {self.unit}" if self.unit else "")


@dataclass(frozen=True, kw_only=True)
class Scores:
    """The scores of one model on one set of rows.

    Attributes:
        values: each name of a metric -> its value; the metric that chooses the best checkpoint comes first.
        baselines: ``majority`` (the best constant prediction for each question type, on these very rows),
            ``blank_image`` (the same model given grey images) and ``linear_probe`` (a linear classifier of the frozen
            base's image features, on the rows that it covers) -> name of a metric -> its value.
        by_question_type: each question type -> the scores of its rows, without ``by_question_type``.
        n: the number of rows.
        truncated: the number of rows whose text ended at the limit of tokens, and not where the model ended it.
    """

    values: dict[str, Value]
    baselines: dict[str, dict[str, Value]]
    by_question_type: dict[str, Scores] = field(default_factory=dict)
    n: int
    truncated: int

    def beside(self, baseline: str, metric: str) -> str | None:
        """Return the value of a baseline for people, with the number of its rows if it has fewer; None without one."""
        found, own = self.baselines.get(baseline, {}).get(metric), self.values.get(metric)
        if found is None:
            return None
        return str(found) if own is None or found.n == own.n else f"{found} on {found.n} rows"

    @property
    def first(self) -> Value:
        """The value of the first metric."""
        return next(iter(self.values.values()))

    def to_json(self) -> dict[str, Any]:
        """Return plain data."""
        data = self._part()
        data[_BY] = {name: scores._part() for name, scores in self.by_question_type.items()}
        return data

    def _part(self) -> dict[str, Any]:
        return {
            "values": _values_to_json(self.values),
            "baselines": {name: _values_to_json(values) for name, values in self.baselines.items()},
            "n": self.n,
            "truncated": self.truncated,
        }

    @classmethod
    def from_json(cls, data: Any) -> Scores:
        """Return the scores that ``to_json`` wrote.

        Raises:
            DataError: a field is missing, unknown, given under two names or of another type, or a number is not finite.
        """
        data = current_names(data, SCORES, source="scores", error=DataError)
        rest = dict(_object(data, "scores", {"values", "baselines", _BY, "n", "truncated"}))
        parts = {name: cls._of(part, f"{_BY}.{name}") for name, part in _object(rest.pop(_BY), _BY).items()}
        return cls._of(rest, "scores", by_question_type=parts)

    @classmethod
    def _of(cls, data: Any, where: str, by_question_type: dict[str, Scores] | None = None) -> Scores:
        _object(data, where, {"values", "baselines", "n", "truncated"})
        baselines = _object(data["baselines"], f"{where}.baselines")
        return cls(
            values=_values(data["values"], f"{where}.values"),
            baselines={name: _values(values, f"{where}.baselines.{name}") for name, values in baselines.items()},
            by_question_type=by_question_type or {},
            n=_count(data["n"], f"{where}.n"),
            truncated=_count(data["truncated"], f"{where}.truncated"),
        )


def _values_to_json(values: dict[str, Value]) -> dict[str, Any]:
    return {
        name: asdict(value) | {"interval": None if value.interval is None else list(value.interval)}
        for name, value in values.items()
    }


def _values(data: Any, where: str) -> dict[str, Value]:
    return {name: _value(part, f"{where}.{name}") for name, part in _object(data, where).items()}


def _value(data: Any, where: str) -> Value:
    _object(data, where, {each.name for each in fields(Value)})
    interval, unit, higher = data["interval"], data["unit"], data["higher_is_better"]
    if interval is not None and not (isinstance(interval, list) and len(interval) == 2):
        raise _wrong(f"{where}.interval", "[LOW, HIGH] or null", interval)
    if unit is not None and not isinstance(unit, str):
        raise _wrong(f"{where}.unit", "a text or null", unit)
    if not isinstance(higher, bool):
        raise _wrong(f"{where}.higher_is_better", "true or false", higher)
    low_high = None if interval is None else [_number(bound, f"{where}.interval") for bound in interval]
    return Value(
        value=_number(data["value"], f"{where}.value"),
        interval=None if low_high is None else (low_high[0], low_high[1]),
        n=_count(data["n"], f"{where}.n"),
        unit=unit,
        higher_is_better=higher,
    )


def _object(data: Any, where: str, keys: set[str] | None = None) -> dict[str, Any]:
    if not isinstance(data, dict):
        raise _wrong(where, "an object", data)
    if keys is not None and data.keys() != keys:
        raise _wrong(where, f"an object with the keys {', '.join(sorted(keys))}", sorted(data))
    return data


def _number(value: Any, where: str) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise _wrong(where, "a finite number", value)
    return float(value)


def _count(value: Any, where: str) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or value < 0:
        raise _wrong(where, "a whole number from 0", value)
    return value


def _wrong(where: str, wanted: str, got: Any) -> DataError:
    return DataError(f"{plain(where)} must be {wanted}, got {plain(repr(got), 80)}")
