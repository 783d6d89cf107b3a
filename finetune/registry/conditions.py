"""Conditions on metrics, as people write them: ``after.exact_match>=0.7``."""

import math
import operator
import re
import textwrap
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from finetune.errors import ConditionError
from finetune.lookup import did_you_mean

_FORM = re.compile(r"\s*([A-Za-z0-9_][A-Za-z0-9_.@/-]{0,99}?)\s*(>=|<=|==|>|<)\s*(\S{1,32})\s*")
_OPERATORS: dict[str, Callable[[float, float], bool]] = {
    ">=": operator.ge,
    "<=": operator.le,
    "==": operator.eq,
    ">": operator.gt,
    "<": operator.lt,
}


@dataclass(frozen=True, kw_only=True)
class Condition:
    """A number that must stand in nested metrics.

    Attributes:
        path: the keys that lead to it, with dots between them.
        op: ``>=``, ``<=``, ``==``, ``>`` or ``<``.
        value: what it is compared with.
    """

    path: str
    op: str
    value: float

    @classmethod
    def parse(cls, text: str) -> "Condition":
        """Reads a condition such as ``after.exact_match>=0.7``.

        Raises:
            ConditionError: it is none.
        """
        match = _FORM.fullmatch(text)
        value = _number(match[3]) if match else None
        if match is None or value is None:
            raise ConditionError(
                f"{text!r} is no condition: give the path of a metric, one of {', '.join(_OPERATORS)}, and a number, "
                "such as 'after.exact_match>=0.7'"
            )
        return cls(path=match[1], op=match[2], value=value)

    def holds(self, metrics: Mapping[str, Any]) -> bool:
        """Whether the number is there and is as it must be."""
        found = dict(numbers(metrics)).get(self.path)
        return found is not None and _OPERATORS[self.op](found, self.value)

    def describe(self, metrics: Mapping[str, Any]) -> str:
        """Returns the condition and what was found, in one line of at most 256 characters."""
        paths = dict(numbers(metrics))
        if self.path in paths:
            return f"{self}: it is {paths[self.path]:.6g}"
        # The few of a whole split come before the many of its kinds, so that no cut hides them.
        names = sorted(paths, key=lambda name: (name.count("."), not name.startswith("test."), name))
        hint = _hint(self.path, names) if len(self.path) < 40 else ""
        there = ", ".join(names) or "none"
        return textwrap.shorten(f"{self}: there is no such metric.{hint} There are: {there}", 256, placeholder=" ...")

    def __str__(self) -> str:
        return f"{self.path}{self.op}{self.value:.6g}"


def _hint(path: str, names: Sequence[str]) -> str:
    """Returns the metric that was meant: one of the same last word, or one written alike."""
    last = path.rpartition(".")[2]
    same = [name for name in names if name.rpartition(".")[2] == last]
    return f" Did you mean {same[0]!r}?" if same else did_you_mean(path, names)


def _number(text: str) -> float | None:
    try:
        value = float(text)
    except ValueError:
        return None
    return value if math.isfinite(value) else None


def numbers(metrics: Any, above: str = "") -> Iterator[tuple[str, float]]:
    """Yield path and value of each finite number in nested metrics; what is no mapping of them holds none."""
    if not isinstance(metrics, Mapping):
        return
    for key, value in metrics.items():
        if isinstance(value, Mapping):
            yield from numbers(value, f"{above}{key}.")
        elif isinstance(value, int | float) and not isinstance(value, bool):
            with suppress(OverflowError):
                if math.isfinite(value):
                    yield f"{above}{key}", float(value)
