"""The names of plug-ins: the package's own tables, entry points of other packages, and names that a script registers.

An entry point ``finetune.tasks``, ``finetune.metrics``, ... of an installed package adds a name; ``register`` adds one
in a running process. Recipes and manifests give names, which this module looks up; they never give a module to import.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from importlib.metadata import PackageNotFoundError, entry_points, packages_distributions, version
from typing import TYPE_CHECKING, Any

from finetune.core import old_names
from finetune.errors import PluginError
from finetune.lookup import did_you_mean, import_string
from finetune.tables import EXPORT_TARGETS, FAMILIES, METHODS, METRICS, OBJECTIVES, SOURCES, TASKS, Entry, FamilyEntry

if TYPE_CHECKING:
    from collections.abc import Mapping
    from importlib.metadata import EntryPoint

_TABLES: dict[str, Mapping[str, str | Entry | FamilyEntry]] = {
    "exports": EXPORT_TARGETS,
    "families": FAMILIES,
    "methods": METHODS,
    "metrics": METRICS,
    "objectives": OBJECTIVES,
    "sources": SOURCES,
    "tasks": TASKS,
}
GROUPS = tuple(_TABLES)
_FOUND: set[tuple[str, str]] = set()  # names of plug-ins that this process has looked up
_REGISTERED: dict[str, dict[str, Any]] = {group: {} for group in GROUPS}


@dataclass(frozen=True, kw_only=True)
class Provider:
    """The package that a plug-in comes from.

    Attributes:
        package: the name that pip installs; None if no package holds the registered module.
        version: the version of the package; None if unknown.
    """

    package: str | None
    version: str | None


def register(group: str, name: str, target: Any) -> None:
    """Add a name in this process, as an entry point of an installed package would.

    Registering a class again, as in a notebook cell that runs twice, replaces the earlier one.

    Args:
        group: one of ``GROUPS``, such as ``"tasks"``.
        name: the name of the class in recipes and manifests.
        target: the class itself, or ``"module:attribute"``.

    Raises:
        PluginError: there is no such group, or the name is taken.
    """
    _require_group(group)
    if _is_own(group, name) or name in _entry_points(group):
        raise PluginError(
            f"register({group!r}, {name!r}, ...): the name must be new, but {_owner(group, name)} has it. "
            "Choose another."
        )
    if _whose(_REGISTERED[group].get(name, target)) != _whose(target):
        raise PluginError(
            f"register({group!r}, {name!r}, ...): the name must be new, but {_REGISTERED[group][name]!r} has it. "
            "Choose another."
        )
    _REGISTERED[group][name] = target


def unregister(group: str, name: str) -> None:
    """Remove the name that ``register`` added; do nothing if there is no such name."""
    _require_group(group)
    _REGISTERED[group].pop(name, None)


def names(group: str) -> list[str]:
    """Return every name of a group: first the package's own in their order, then the names of plug-ins, sorted."""
    _require_group(group)
    own = list(_TABLES[group])
    return own + sorted({*_entry_points(group), *_REGISTERED[group]} - {*own})


def _whose(target: Any) -> Any:
    return target if isinstance(target, str) else (target.__module__, target.__qualname__)


def in_use(group: str) -> list[str]:
    """Return the package's own names of a group, and those of plug-ins that this process has looked up."""
    return [name for name in names(group) if name in _TABLES[group] or (group, name) in _FOUND]


def is_own(group: str, name: str) -> bool:
    """Return whether a name is one of the package's own."""
    return name in _TABLES[group]


def is_known(group: str, name: str) -> bool:
    """Return whether ``find`` would find a name, without importing it."""
    _require_group(group)
    return name in _TABLES[group] or name in _REGISTERED[group] or name in _entry_points(group)


def require_known(group: str, name: str, *, what: str, error: type[Exception] = ValueError) -> None:
    """Raise ``error`` with the allowed names if ``find`` would not find a name; arguments as for ``find``."""
    if not is_known(group, name):
        allowed = names(group)
        hint = did_you_mean(name, allowed)
        raise error(f"unknown {what} {name!r}.{hint} Allowed: {', '.join(sorted(allowed)) or 'none'}.")


def find(group: str, name: str, *, what: str, error: type[Exception] = ValueError) -> Any:
    """Import and return the object behind a name.

    Args:
        group: one of ``GROUPS``.
        name: the name to find.
        what: the noun for the message, such as ``"method"``.
        error: the class of the error to raise.

    Raises:
        PluginError: the plug-in exists but cannot be imported.
    """
    require_known(group, name, what=what, error=error)
    entry = _TABLES[group].get(name)
    if entry is not None:
        return import_string(entry if isinstance(entry, str) else entry.target)
    target = _REGISTERED[group].get(name)
    _FOUND.add((group, name))
    if target is not None and not isinstance(target, str):
        return target
    try:
        return _entry_points(group)[name].load() if target is None else import_string(target)
    except Exception as problem:  # a module of another package may raise anything
        raise PluginError(
            f"{what} {name!r} of {_owner(group, name)} cannot be imported: {type(problem).__name__}: {problem}. "
            "Install that package again."
        ) from problem


def config_of(group: str, name: str, *, what: str, error: type[Exception] = ValueError) -> Any:
    """Return the class of the section that a recipe or a manifest keeps for a name; arguments as for ``find``.

    Raises:
        PluginError: the plug-in has no attribute ``Config``.
    """
    entry = _TABLES[group].get(name)
    if isinstance(entry, Entry) and entry.config is not None:
        return import_string(entry.config)
    found = find(group, name, what=what, error=error)
    config = getattr(found, "Config", None)
    if config is None:
        raise PluginError(
            f"{what} {name!r} of {_owner(group, name)} must have an attribute Config, a subclass of Section, "
            "but it has none"
        )
    return config


def own_configs(group: str) -> list[Any]:
    """Return the sections of the package's own names, in the order of the table."""
    return [config_of(group, name, what=group) for name in _TABLES[group]]


def provider(group: str, name: str) -> Provider | None:
    """Return the package that a name comes from; None for the package's own names."""
    if name in _TABLES[group]:
        return None
    if (point := _entry_points(group).get(name)) and name not in _REGISTERED[group] and point.dist:
        return Provider(package=point.dist.name, version=point.dist.version)
    target = _REGISTERED[group][name]
    module = target.partition(":")[0] if isinstance(target, str) else target.__module__
    return _provider_of_module(module.partition(".")[0])


def _provider_of_module(module: str) -> Provider:
    packages = packages_distributions().get(module)
    if not packages:
        return Provider(package=None, version=None)
    try:
        return Provider(package=packages[0], version=version(packages[0]))
    except PackageNotFoundError:
        return Provider(package=packages[0], version=None)


def _owner(group: str, name: str) -> str:
    found = None if _is_own(group, name) else provider(group, name)
    if found is None:
        return "finetune itself"
    return f"the package {found.package}" if found.package else "a script"


def _is_own(group: str, name: str) -> bool:
    """Return whether finetune itself has a name, or had it in files that are still read."""
    return name in _TABLES[group] or (group == "methods" and name in old_names.METHODS)


@cache
def _entry_points(group: str) -> Mapping[str, EntryPoint]:
    """Return the entry points of a group by name.

    Raises:
        PluginError: two packages give the same name, or a package gives a name of finetune itself.
    """
    found: dict[str, EntryPoint] = {}
    for point in entry_points(group=f"finetune.{group}"):
        package = point.dist.name if point.dist else point.value
        if _is_own(group, point.name):
            raise PluginError(
                f"a plug-in's name must be new, but the package {package} gives finetune.{group} the name "
                f"{point.name!r}, which finetune itself has. Uninstall {package}, or install a version with another "
                "name."
            )
        other = found.setdefault(point.name, point)
        if other.value != point.value:
            raise PluginError(
                f"a plug-in's name must be new, but two packages give finetune.{group} the name {point.name!r}: "
                f"{package} and {other.dist.name if other.dist else other.value}. Uninstall one of them."
            )
    return found


def _require_group(group: str) -> None:
    if group not in _TABLES:
        raise PluginError(
            f"unknown group of plug-ins {group!r}.{did_you_mean(group, GROUPS)} Allowed: {', '.join(GROUPS)}."
        )
