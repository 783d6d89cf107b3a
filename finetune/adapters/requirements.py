"""The plug-ins that an adapter needs: recorded in its manifest, and checked before the adapter is used."""

from __future__ import annotations

from typing import TYPE_CHECKING

from finetune.adapters.manifest import PluginEntry
from finetune.adapters.task_settings import ForeignTask
from finetune.errors import ManifestError, PluginError, brief, plain
from finetune.plugins import is_known, provider
from finetune.recipe.chosen import Choice
from finetune.recipe.compatibility import why_incompatible
from finetune.tables import METHODS_OF_TASKS

if TYPE_CHECKING:
    from collections.abc import Iterable

    from finetune.adapters.manifest import AdapterManifest

_NOUNS = {"tasks": "task", "methods": "method", "families": "family"}


def plugins_of(names: Iterable[tuple[str, str]]) -> list[PluginEntry]:
    """Return the manifest entries of those (group, name) pairs that come from plug-ins."""
    found = []
    for group, name in names:
        if is_known(group, name) and (from_outside := provider(group, name)):
            found.append(
                PluginEntry(group=group, name=name, package=from_outside.package, version=from_outside.version)
            )
    return found


def require_usable(manifest: AdapterManifest, *, architecture: str | None = None) -> None:
    """Check that this machine has all plug-ins of an adapter, and that its task fits its base.

    Args:
        manifest: the manifest of the adapter.
        architecture: the architecture of the loaded base; by default that of its ``model_type``.

    Raises:
        PluginError: a plug-in is not installed; the message names the package.
        ManifestError: the manifest names no package for a plug-in, or the task is for another architecture.
    """
    used = [("tasks", manifest.task.name), *(("methods", part.method) for part in manifest.adapter.parts)]
    named = {(entry.group, entry.name): entry for entry in manifest.plugins}
    if ("families", manifest.base.model_type) in named:
        used.append(("families", manifest.base.model_type))
    for group, name in used:
        what = f"{_NOUNS[group]} {name!r}"
        if not is_known(group, name):
            raise _missing(manifest, what, named.get((group, name)))
    if isinstance(manifest.task, ForeignTask):
        name = manifest.task.name
        try:
            Choice("tasks").config({"name": name}).model_validate(manifest.task.model_dump())
        except ValueError as error:
            entry = named[("tasks", name)]
            raise PluginError(
                f"{manifest.full_name}: the installed version of {entry.package or 'the task'} does not accept the "
                f"settings of task {name!r}: {plain(str(error), 300)}. Install the version that trained the adapter: "
                f"{entry.version or 'unknown'}."
            ) from None
    _require_parts(manifest)
    if reason := why_incompatible(manifest.task.name, manifest.base.model_type, architecture=architecture):
        raise ManifestError(f"{manifest.full_name}: the task must fit the architecture of the base: {reason}")


def _require_parts(manifest: AdapterManifest) -> None:
    """Check that an adapter has the parts of its task, and no part of another task."""
    has = {part.method: part.options for part in manifest.adapter.parts if part.method in METHODS_OF_TASKS}
    brings = {part.name: part for part in manifest.task.parts}
    for name in has.keys() | brings.keys():
        if name not in brings or name not in {part.method for part in manifest.adapter.parts}:
            must, found = ("must have", "has none") if name in brings else ("must not have", "has one")
            raise ManifestError(
                f"{manifest.full_name}: an adapter for the task {manifest.task.name} {must} the part {name}, but this "
                f"one {found}. Train it again."
            )
    for name, options in has.items():
        wanted = {key: value for key, value in brings[name] if key in options}
        if options != wanted:
            raise ManifestError(
                f"{manifest.full_name}: the part {name} must have the options {brief(wanted)} of the task "
                f"{manifest.task.name}, got {brief(options)}. Train the adapter again."
            )


def _missing(manifest: AdapterManifest, what: str, entry: PluginEntry | None) -> PluginError | ManifestError:
    if entry is None:
        return ManifestError(
            f"{manifest.full_name} needs the {what}, which no installed package provides. Its manifest names no "
            "package for it. Ask the publisher for the package."
        )
    if entry.package is None:
        return PluginError(
            f"{manifest.full_name} needs the {what}, which the training script registered. Register it with "
            "finetune.register before you load the adapter."
        )
    at = f" (trained with version {entry.version})" if entry.version else ""
    package = plain(entry.package, 80)
    return PluginError(
        f"{manifest.full_name} needs the {what}. Its manifest names the package {package}{at}, which is not installed. "
        f"If you trust it: pip install {package}"
    )
