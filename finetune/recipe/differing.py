"""The differences between two recipes, or records that hold them, by key."""

from collections.abc import Collection
from typing import Any

from finetune.errors import brief

LENGTH = frozenset({"train.epochs", "train.max_steps", "train.early_stopping_patience"})
"""The keys that only set when a run ends."""


def differing(there: Any, here: Any, key: str = "") -> dict[str, tuple[Any, Any]]:
    """Return dotted key -> the values of both, of plain data."""
    if isinstance(there, dict) and isinstance(here, dict):
        found: dict[str, tuple[Any, Any]] = {}
        for name in dict.fromkeys([*there, *here]):
            found |= differing(there.get(name), here.get(name), f"{key}.{name}".lstrip("."))
        return found
    return {} if there == here else {key: (there, here)}


def describe(differences: dict[str, tuple[Any, Any]], most: int = 8) -> str:
    """Return differences as a part of a message."""
    texts = [f"{key} is {brief(there)} there and {brief(here)} here" for key, (there, here) in differences.items()]
    return "; ".join(texts[:most])


def is_longer_only(differences: Collection[str], prefix: str = "") -> bool:
    """Return whether there are such dotted keys and all of them only set when a run ends."""
    return bool(differences) and all(key.removeprefix(prefix) in LENGTH for key in differences)
