"""Plug-ins that an adapter needs: recorded when it is saved, checked before it is used."""

from __future__ import annotations

from typing import TYPE_CHECKING

from finetune.adapters.manifest import ForeignTask, PluginEntry
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
    """Return the plug-ins among (group, name) pairs, as a manifest keeps them."""
    found = []
    for group, name in names:
        if is_known(group, name) and (from_outside := provider(group, name)):
            found.append(
                PluginEntry(group=group, name=name, package=from_outside.package, version=from_outside.version)
            )
    return found


def require_usable(manifest: AdapterManifest, *, architecture: str | None = None) -> None:
    """Check that this machine has everything that an adapter needs, and that its task serves its base.

    Args:
        manifest: the manifest of the adapter.
        architecture: the architecture of the base, where it is loaded; by default the known one of its ``model_type``.

    Raises:
        PluginError: a plug-in is not installed, with the package to install.
        ManifestError: it names something that no package has, or its task is for bases of another architecture.
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
                f"{manifest.full_name}: the installed version of {entry.package or 'the task'} does not take the "
                f"settings of its task {name!r}: {plain(str(error), 300)}. It was trained with version "
                f"{entry.version or 'unknown'}."
            ) from None
    _require_parts(manifest)
    if reason := why_incompatible(manifest.task.name, manifest.base.model_type, architecture=architecture):
        raise ManifestError(f"the adapter's task is for another architecture: {reason}")


def _require_parts(manifest: AdapterManifest) -> None:
    """Check that an adapter has the parts that its task brings, and none that only another task would."""
    has = {part.method: part.options for part in manifest.adapter.parts if part.method in METHODS_OF_TASKS}
    brings = {part.name: part for part in manifest.task.parts}
    for name in has.keys() | brings.keys():
        if name not in brings or name not in {part.method for part in manifest.adapter.parts}:
            which = "brings" if name in brings else "does not bring"
            raise ManifestError(
                f"{manifest.full_name}: its task {manifest.task.name} {which} the part {name}, and the adapter "
                f"{'lacks it' if name in brings else 'has it'}"
            )
    for name, options in has.items():
        wanted = {key: value for key, value in brings[name] if key in options}
        if options != wanted:
            raise ManifestError(
                f"{manifest.full_name}: its task {manifest.task.name} takes the part {name} with {brief(wanted)}, and "
                f"the adapter has it with {brief(options)}"
            )


def _missing(manifest: AdapterManifest, what: str, entry: PluginEntry | None) -> PluginError | ManifestError:
    if entry is None:
        return ManifestError(
            f"{manifest.full_name} needs the {what}, which is not known here, and its manifest names no package that "
            "has it. Ask who published it."
        )
    if entry.package is None:
        return PluginError(
            f"{manifest.full_name} needs the {what}, which a script registered when it was trained. Register it with "
            "finetune.register before the adapter is loaded."
        )
    at = f" (trained with version {entry.version})" if entry.version else ""
    package = plain(entry.package, 80)
    return PluginError(
        f"{manifest.full_name} needs the {what}. Its manifest names the package {package}{at}, which is not installed. "
        f"If you trust it: pip install {package}"
    )
