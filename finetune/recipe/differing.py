"""The differences between two recipes, or between records that hold recipes, by key."""

from collections.abc import Collection
from typing import Any

from finetune.errors import brief

LENGTH = frozenset({"train.epochs", "train.max_steps", "train.early_stopping_patience"})
"""The keys that only set when a run ends."""


def differing(before: Any, now: Any, key: str = "") -> dict[str, tuple[Any, Any]]:
    """Return each dotted key whose values differ -> (value before, value now).

    Args:
        before: the plain data of the earlier record.
        now: the plain data of the present record.
        key: the dotted key of the two values within their records.
    """
    if isinstance(before, dict) and isinstance(now, dict):
        found: dict[str, tuple[Any, Any]] = {}
        for name in dict.fromkeys([*before, *now]):
            found |= differing(before.get(name), now.get(name), f"{key}.{name}".lstrip("."))
        return found
    return {} if before == now else {key: (before, now)}


def describe(differences: dict[str, tuple[Any, Any]], most: int = 8) -> str:
    """Return differences as a part of a message.

    Args:
        differences: the differences, as ``differing`` returns them.
        most: the largest number of differences in the text.
    """
    texts = [f"{key} was {brief(before)} and is now {brief(now)}" for key, (before, now) in differences.items()]
    return "; ".join(texts[:most])


def is_longer_only(differences: Collection[str], prefix: str = "") -> bool:
    """Return whether there are differences, and all of them only set when a run ends.

    Args:
        differences: the dotted keys whose values differ.
        prefix: the part before the recipe's own keys, with its dot.
    """
    return bool(differences) and all(key.removeprefix(prefix) in LENGTH for key in differences)
