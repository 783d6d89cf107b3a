"""The source of an image in a field of a row: the path of its file, or a place in a table."""

from __future__ import annotations

import re
import unicodedata
from contextlib import suppress
from typing import TYPE_CHECKING, Any

from finetune.core.example import ImageHandle
from finetune.errors import RowError, brief, plain

if TYPE_CHECKING:
    from pathlib import Path

    from finetune.core.example import ImageSource

_URL = re.compile(r"(?:data:|[a-z][a-z0-9+.-]*://)", re.IGNORECASE)
_BASE64 = re.compile(r"[A-Za-z0-9+/_=\s-]+")
_SAVE_IMAGE = "Save the image as a file beside the rows, or keep images in Parquet."


def as_image(value: Any, root: Path, where: str) -> ImageSource:
    """Return the source of the image that a field holds: a path, or a place in a table."""
    if isinstance(value, ImageHandle):
        return value
    if value is None:
        raise RowError(
            f"{where}: an image must be the path of its file, got null. Name the file, or leave the row out.",
            reason="missing image",
        )
    if not isinstance(value, str) or not value.strip():
        raise RowError(f"{where}: an image must be the path of its file, got {brief(value, 80)}", reason="wrong type")
    if _URL.match(value):
        raise RowError(
            f"{where}: an image must be the path of its file, got the URL {brief(value, 60)}. {_SAVE_IMAGE}",
            reason="image is not a path",
        )
    path = _file_of(root, value)
    if path is None:
        raise RowError(f"{where}: {_why_no_file(root / value, value)}", reason="missing image")
    return path


def _file_of(root: Path, value: str) -> Path | None:
    """Return the file of a path; path and file may differ in how accents are written: as one character or two."""
    for name in dict.fromkeys((value, unicodedata.normalize("NFC", value), unicodedata.normalize("NFD", value))):
        with suppress(OSError, ValueError):  # the name is too long, or has characters that no name may have
            if (root / name).is_file():
                return root / name
    return None


def _why_no_file(path: Path, value: str) -> str:
    if len(value) > 255 and _BASE64.fullmatch(value):
        return f"an image must be the path of its file, got {brief(value, 60)}, which looks like base64. {_SAVE_IMAGE}"
    with suppress(OSError, ValueError):
        if path.is_dir():
            return f"an image must be the path of its file, got the folder {plain(str(path))}"
    return f"the image {plain(str(path))} does not exist. Check the path and data.root."
