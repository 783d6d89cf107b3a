"""Plug-ins that an adapter needs: written down when it is saved, looked for before it is used."""

from __future__ import annotations

from typing import TYPE_CHECKING

from finetune.adapters.manifest import PluginEntry
from finetune.errors import ManifestError, PluginError
from finetune.plugins import is_known, provider
from finetune.recipe.pairing import why_impossible

if TYPE_CHECKING:
    from collections.abc import Iterable

    from finetune.adapters.manifest import AdapterManifest


def plugins_of(names: Iterable[tuple[str, str]]) -> list[PluginEntry]:
    """Return what a manifest keeps of (group, name) pairs: those that packages outside give."""
    found = []
    for group, name in names:
        if is_known(group, name) and (from_outside := provider(group, name)):
            found.append(
                PluginEntry(group=group, name=name, package=from_outside.package, version=from_outside.version)
            )
    return found


def require_usable(manifest: AdapterManifest, *, architecture: str | None = None) -> None:
    """Check that this machine has what an adapter needs, and that its task serves its base.

    Args:
        manifest: of the adapter.
        architecture: of the base, where that is loaded; by default what is known of its ``model_type``.

    Raises:
        PluginError: a plug-in is not installed, with the package to install.
        ManifestError: it names something that no package has, or its task is for bases of another architecture.
    """
    named = [("tasks", manifest.task.name), *(("methods", part.method) for part in manifest.adapter.parts)]
    needed = {(entry.group, entry.name): entry for entry in manifest.plugins}
    for group, name in dict.fromkeys([*needed, *named]):
        if is_known(group, name):
            continue
        entry = needed.get((group, name))
        noun = group.removesuffix("s")
        if entry is None:
            raise ManifestError(
                f"{manifest.full_name} needs the {noun} {name!r}, which is not known here, and its manifest names no "
                "package that has it. Ask who published it."
            )
        at = f" (trained with version {entry.version})" if entry.version else ""
        raise PluginError(
            f"{manifest.full_name} needs the {noun} {name!r} of the package {entry.package}{at}, which is not "
            f"installed. Install it, such as by: pip install {entry.package}"
        )
    if reason := why_impossible(manifest.task.name, manifest.base.model_type, architecture=architecture):
        raise ManifestError(f"the adapter's task is for another architecture: {reason}")
