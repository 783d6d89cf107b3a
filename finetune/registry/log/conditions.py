"""Conditions on metrics, such as ``test.METRIC>=0.7``."""

import math
import operator
import re
import textwrap
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from finetune.errors import ConditionError
from finetune.lookup import did_you_mean
from finetune.tables import ANSWER_METRICS

EXAMPLE = f"test.{ANSWER_METRICS[0]}>=0.7"

_FORM = re.compile(r"\s*([A-Za-z0-9_][A-Za-z0-9_.@/-]{0,99}?)\s*(>=|<=|==|>|<)\s*(\S{1,32})\s*")
_RENAMED = {"before": "base", "after": "test"}
_OPERATORS: dict[str, Callable[[float, float], bool]] = {
    ">=": operator.ge,
    "<=": operator.le,
    "==": operator.eq,
    ">": operator.gt,
    "<": operator.lt,
}


@dataclass(frozen=True, kw_only=True)
class Condition:
    """A number that must be among the values of an evaluation.

    Attributes:
        path: the name of the value, such as ``test.n``; see ``finetune.metrics.names``.
        op: ``>=``, ``<=``, ``==``, ``>`` or ``<``.
        value: the number to compare with.
    """

    path: str
    op: str
    value: float

    @classmethod
    def parse(cls, text: str) -> "Condition":
        """Read a condition such as ``test.METRIC>=0.7``.

        Raises:
            ConditionError: the text is not a condition.
        """
        match = _FORM.fullmatch(text)
        value = _number(match[3]) if match else None
        if match is None or value is None:
            raise ConditionError(
                f"a condition must be the name of a value, one of {', '.join(_OPERATORS)}, and a number, such as "
                f"'{EXAMPLE}'; got {text!r}"
            )
        path = match[1]
        if (who := path.partition(".")[0]) in _RENAMED:
            raise ConditionError(
                f"the name of a metric must begin with test or base, got {text!r}. Release 0.1 wrote {who} for "
                f"{_RENAMED[who]}: use {_RENAMED[who]}.{path.rpartition('.')[2]}."
            )
        return cls(path=path, op=match[2], value=value)

    def holds(self, values: Mapping[str, float]) -> bool:
        """Return whether the value exists and meets the condition."""
        found = values.get(self.path)
        return found is not None and _OPERATORS[self.op](found, self.value)

    def describe(self, values: Mapping[str, float]) -> str:
        """Return the condition and the value found, in one line of at most 256 characters."""
        if self.path in values:
            return f"{self}: it is {values[self.path]:.6g}"
        # The few values of a whole split come before the many of its question types, so that no cut hides them.
        names = sorted(values, key=lambda name: (name.count("."), not name.startswith("test."), name))
        hint = _hint(self.path, names) if len(self.path) < 40 else ""
        there = ", ".join(names) or "none"
        return textwrap.shorten(f"{self}: there is no such metric.{hint} There are: {there}", 256, placeholder=" ...")

    def __str__(self) -> str:
        return f"{self.path}{self.op}{self.value:.6g}"


def _hint(path: str, names: Sequence[str]) -> str:
    """Return a hint to the metric with the same last word, or else to one with a similar name."""
    last = path.rpartition(".")[2]
    same = [name for name in names if name.rpartition(".")[2] == last]
    return f" Did you mean {same[0]!r}?" if same else did_you_mean(path, names)


def _number(text: str) -> float | None:
    try:
        value = float(text)
    except ValueError:
        return None
    return value if math.isfinite(value) else None
