"""Names of earlier releases in recipes and saved files, and their present names.

Each reader of recipes or saved files calls ``current_names`` with a table of paths. A digest of a recipe is made of
``earlier_names``, so that it is the same in every release. A path has keys from the top::

    data.kind                the key ``kind`` of the section ``data``
    data.sources.*.data.kind ``*`` is every key of a mapping
    method[].name=lora       the value ``lora`` of the key ``name``; ``[]`` allows a list of sections too
"""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any

from finetune.errors import plain

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from finetune.errors import FinetuneError


def _below(above: str, table: Mapping[str, str]) -> dict[str, str]:
    return {f"{above}.{path}": new for path, new in table.items()}


# The sources of rows that had the earlier names. A plug-in's source may have keys of its own with these names.
_SOURCES = ("hub", "jsonl", "parquet", "saved")
METHODS = {"overrides": "full_modules"}
# Path -> the present name of its last key, or of the value after ``=``.
RECIPE = {
    "data.kind": "question_type",
    "data.sources.*.data.kind": "question_type",
    **{f"method[].name={old}": new for old, new in METHODS.items()},
}
RUN = _below("recipe", RECIPE)  # the identity of a run in its checkpoints
ADAPTER_CONFIG = {f"parts[].method={old}": new for old, new in METHODS.items()}
SCORES = {"by_kind": "by_question_type"}
METRICS = _below("*", SCORES)  # the scores of an adapter and its base
MANIFEST = _below("training.recipe", RECIPE) | _below("adapter", ADAPTER_CONFIG) | _below("metrics", METRICS)


def current_names(
    data: Any,
    table: Mapping[str, str],
    *,
    source: str,
    error: type[FinetuneError],
) -> Any:
    """Return plain data with present names in the place of earlier ones; other data is unchanged.

    Args:
        data: the plain data; this function does not change it.
        table: each path of an earlier name -> the present name.
        source: the path or name of the data, for errors.
        error: the class of the error.

    Raises:
        FinetuneError: a section has both names of one key; the error has the class ``error``.
    """

    def refuse(place: Sequence[str], old: str, new: str) -> None:
        names = [plain(".".join((*place, name))) for name in (new, old)]
        raise error(
            f"{source}: {names[0]} must be given once, but its earlier name {names[1]} is given too. Remove {names[1]}."
        )

    return _renamed(data, table, lambda old, new: (old, new), refuse)


def earlier_names(data: Any, table: Mapping[str, str]) -> Any:
    """Return plain data with earlier names in the place of present ones, as the digest of a recipe needs it.

    Args:
        data: the plain data; this function does not change it.
        table: each path of an earlier name -> the present name.
    """
    return _renamed(data, table, lambda old, new: (new, old), lambda *_: None)


def current_key(key: str, table: Mapping[str, str]) -> str:
    """Return the present name of a dotted key; any other key is unchanged."""
    return next((new for old, new in _pairs(key, table) if old == key), key)


def other_names(key: str, table: Mapping[str, str]) -> list[str]:
    """Return the last parts of the other names, earlier and present, of a dotted key."""
    return [name.rpartition(".")[2] for pair in _pairs(key, table) for name in pair if key in pair and name != key]


def had_earlier_names(section: Mapping[str, Any]) -> bool:
    """Return whether a section is of a kind whose keys had earlier names: of no source, or of one of this package."""
    return section.get("source", _SOURCES[0]) in _SOURCES


def _pairs(key: str, table: Mapping[str, str]) -> list[tuple[str, str]]:
    """Return the earlier and the present name of each renamed key that stands beside a dotted key."""
    *above, _ = key.split(".")
    pairs = []
    for path, new in table.items():
        *names, old = path.split(".")
        if "=" not in old and len(names) == len(above):
            if all(name in ("*", part) for name, part in zip(names, above, strict=True)):
                pairs.append((".".join((*above, old)), ".".join((*above, new))))
    return pairs


def _renamed(
    data: Any,
    table: Mapping[str, str],
    direction: Callable[[str, str], tuple[str, str]],
    both: Callable[[Sequence[str], str, str], None],
) -> Any:
    """Return plain data renamed by a table.

    Args:
        data: the plain data; this function does not change it.
        table: each path of an earlier name -> the present name.
        direction: the function that returns (name before, name after) of (earlier name, present name).
        both: called with the place and both names of a key where a section has both; the section stays unchanged.
    """
    for path, new in table.items():
        *above, last = path.split(".")
        key, is_value, value = last.partition("=")
        before, after = direction(value if is_value else key, new)
        data = _at(data, above, partial(_rename, key if is_value else None, before, after, both))
    return data


def _rename(
    key: str | None,
    before: str,
    after: str,
    both: Callable[[Sequence[str], str, str], None],
    section: dict[str, Any],
    place: Sequence[str],
) -> dict[str, Any]:
    """Return a section with its key ``before`` renamed, or the value ``before`` of its key ``key``."""
    if key is not None:
        return section | {key: after} if section.get(key) == before else section
    if before not in section or not had_earlier_names(section):
        return section
    if after in section:
        both(place, before, after)
        return section
    return {after if name == before else name: part for name, part in section.items()}


def _at(data: Any, keys: Sequence[str], change: Callable[..., Any], place: tuple[str, ...] = ()) -> Any:
    """Return plain data with ``change`` applied to each mapping below ``keys``."""
    if not isinstance(data, dict):
        return data
    if not keys:
        return change(data, place)
    key, *rest = keys
    key, many = key.removesuffix("[]"), key.endswith("[]")
    out = dict(data)
    for name in list(data) if key == "*" else [key] if key in data else []:
        value, inner = data[name], (*place, str(name))
        if many and isinstance(value, list):
            out[name] = [_at(part, rest, change, inner) for part in value]
        else:
            out[name] = _at(value, rest, change, inner)
    return out
