"""Checks that a command can write to its places: the run's folder, and the registry."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

from finetune.adapters.reference import AdapterRef, check_alias
from finetune.errors import LaunchError, RecipeError, StoreError
from finetune.registry.storage.local import LocalStore
from finetune.registry.storage.location import is_registry

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from finetune.registry import AdapterRegistry


def check_output_folder(folder: Path, *, key: str) -> None:
    """Check that a folder exists and can be written, or can be created; this creates nothing.

    Args:
        folder: the folder that a command writes to.
        key: the recipe's key or the option that names the folder.

    Raises:
        RecipeError: the folder cannot be written.
    """
    if problem := _why_not_writable(folder):
        raise RecipeError(f"{key}: {folder} cannot be written: {problem}. Set another folder.")


def check_output_place(path: Path, *, option: str) -> None:
    """Check that the file of an option of the command line can be written.

    Args:
        path: the path of the file.
        option: the option, such as ``--json``.

    Raises:
        LaunchError: the file cannot be written.
    """
    problem = "it is a folder" if path.is_dir() else _why_not_writable(path.absolute().parent)
    if problem:
        raise LaunchError(f"{option} {path}: the file cannot be written: {problem}. Give another path.")


def check_registry(registry: AdapterRegistry, name: str, aliases: Sequence[str]) -> None:
    """Check that a version of ``name`` can be published, as far as possible without writing.

    It does not open a signing key that needs a passphrase.

    Args:
        registry: the registry to publish to.
        name: the name of the adapter, ``ns/name``.
        aliases: the aliases that will point to the new version.

    Raises:
        AdapterReferenceError: a name or alias is not allowed.
        RegistryError: the registry cannot be read, or its folder cannot be written.
        TrustError: the namespace requires signatures, and there is no key that may sign.
    """
    ref = AdapterRef.parse_name(name)
    for alias in aliases:
        check_alias(alias)
    if isinstance(registry.store, LocalStore) and (problem := _why_not_writable(registry.store.root)):
        raise StoreError(
            f"the registry {registry.store.root} cannot be written: {problem}. Set FINETUNE_REGISTRY to another "
            "location, or adapter.publish: null."
        )
    is_registry(registry.store)
    registry.guard.check_signer(ref.namespace, unlock=False)


def _why_not_writable(folder: Path) -> str | None:
    """Return the reason why nothing can be written below ``folder``; None if it can."""
    place = folder.absolute()
    try:
        os.stat(place)
    except (FileNotFoundError, NotADirectoryError):
        pass
    except OSError as error:  # such as a name that is too long, or a loop of links
        return error.strerror
    while not os.path.lexists(place):
        place = place.parent
    if not place.is_dir():
        return f"{place} is not a folder"
    if not os.access(place, os.W_OK | os.X_OK):
        return f"this user has no permission to write to {place}"
    return None
