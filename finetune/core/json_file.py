"""Plain data in a JSON file for people; the file is written whole or not at all."""

from __future__ import annotations

import json
import os
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pathlib import Path


def aside_of(path: Path) -> Path:
    """Return the path that ``write_json`` writes before it renames; a process that is killed leaves it there."""
    return path.with_name(f".{path.name}.new")


def write_json(path: Path, value: Any) -> None:
    """Write plain data, whole or not at all.

    Raises:
        OSError: it cannot be written; what was there is as it was.
    """
    aside = aside_of(path)
    # What stands there may be a link: it is removed, and the file that it leads to is left alone.
    aside.unlink(missing_ok=True)
    with aside.open("x", encoding="utf-8") as file:
        file.write(json.dumps(value, indent=2) + "\n")
        file.flush()
        os.fsync(file.fileno())
    aside.replace(path)
