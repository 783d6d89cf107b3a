"""Plain data in a JSON file for people; a write is complete or leaves the file unchanged."""

from __future__ import annotations

import json
import os
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pathlib import Path


def aside_of(path: Path) -> Path:
    """Return the path that ``write_json`` writes before it renames; a killed process leaves this file."""
    return path.with_name(f".{path.name}.new")


def write_json(path: Path, value: Any) -> None:
    """Write plain data, completely or not at all.

    Raises:
        OSError: the file cannot be written; its earlier content stays.
    """
    aside = aside_of(path)
    # A link may be there: remove it, and leave its target alone.
    aside.unlink(missing_ok=True)
    with aside.open("x", encoding="utf-8") as file:
        file.write(json.dumps(value, indent=2) + "\n")
        file.flush()
        os.fsync(file.fileno())
    aside.replace(path)
