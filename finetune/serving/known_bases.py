"""The folders of bases that this machine used, so that an adapter finds its own base."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

from finetune.core.cache import cache_home, read_note, write_note
from finetune.errors import BaseMismatchError, brief

if TYPE_CHECKING:
    from finetune.adapters.manifest import BaseIdentity


def find_base(identity: BaseIdentity) -> str:
    """Return the folder in which this machine last used a base, or its hub id.

    Raises:
        BaseMismatchError: this machine has not used the base, and the base has no hub id.
    """
    if (path := read_note(_base_note(identity)) or _noted_before(identity)) and Path(path).is_dir():
        return path
    if identity.hub_id and not Path(identity.hub_id).exists():  # a folder of that name is another base
        return identity.hub_id
    raise BaseMismatchError(
        f"The adapter needs the {identity.model_type} base with identity {identity.digest[:16]} "
        f"({brief(sorted(identity.files), 300)}), and this machine knows no folder of it. Give its folder: "
        "base=PATH (--base)."
    )


def remember_base(identity: BaseIdentity, path: str) -> None:
    """Save the folder of a base, so that ``load`` finds it without ``base=``."""
    if Path(path).is_dir():
        write_note(_base_note(identity), str(Path(path).resolve()))


def _noted_before(identity: BaseIdentity) -> str | None:
    """Return the folder that an earlier version saved; None if there is none, or its file cannot be read."""
    try:
        note = json.loads(_base_note(identity).with_suffix(".json").read_bytes())
    except (OSError, ValueError, RecursionError):
        return None
    path = note.get("path") if isinstance(note, dict) else None
    return path if isinstance(path, str) and "\0" not in path else None


def _base_note(identity: BaseIdentity) -> Path:
    return cache_home() / "bases" / identity.digest
