"""Names: the import of a ``"module:attribute"`` string, and suggestions for an unknown name."""

import difflib
import importlib
from collections.abc import Iterable, Mapping
from typing import Any, TypeVar

T = TypeVar("T")


def import_string(target: str) -> Any:
    """Import and return the object of ``target``, a ``"package.module:attribute"`` string from a table."""
    module, _, attribute = target.partition(":")
    return getattr(importlib.import_module(module), attribute)


def did_you_mean(name: object, allowed: Iterable[object]) -> str:
    """Return ``" Did you mean 'x'?"``, or an empty string if no allowed name is close."""
    close = difflib.get_close_matches(str(name), [str(a) for a in allowed], n=1, cutoff=0.6)
    return f" Did you mean {close[0]!r}?" if close else ""


def look_up(table: Mapping[str, T], name: str, *, what: str, error: type[Exception] = ValueError) -> T:
    """Return ``table[name]``, or raise ``error`` with the names that are allowed.

    Args:
        table: the table of names.
        name: the name to look up.
        what: the noun for the message, such as ``"method"``.
        error: the class of the error to raise.
    """
    try:
        return table[name]
    except KeyError:
        allowed = ", ".join(sorted(table)) or "none"
        hint = did_you_mean(name, table)
        raise error(f"unknown {what} {name!r}.{hint} Allowed: {allowed}.") from None
