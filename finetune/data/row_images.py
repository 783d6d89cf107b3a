"""The source of an image in a field of a row: the path of its file, or a place in a table."""

from __future__ import annotations

import re
import unicodedata
from contextlib import suppress
from typing import TYPE_CHECKING, Any

from finetune.errors import RowError, brief, plain
from finetune.example import ImageHandle

if TYPE_CHECKING:
    from pathlib import Path

    from finetune.example import ImageSource

_URL = re.compile(r"(?:data:|[a-z][a-z0-9+.-]*://)", re.IGNORECASE)
_BASE64 = re.compile(r"[A-Za-z0-9+/_=\s-]+")


def as_image(value: Any, root: Path, where: str) -> ImageSource:
    """Return the source of the image that a field holds: a path, or a place in a table."""
    if isinstance(value, ImageHandle):
        return value
    if value is None:
        raise RowError(f"{where}: the image is missing", reason="missing image")
    if not isinstance(value, str) or not value.strip():
        raise RowError(f"{where}: an image is the path of its file, not {brief(value, 80)}", reason="wrong type")
    if _URL.match(value):
        raise RowError(
            f"{where}: an image is the path of its file; {brief(value, 60)} is a URL. Save the image as a file beside "
            "the rows, or keep images in Parquet.",
            reason="image that is no path",
        )
    path = _file_of(root, value)
    if path is None:
        raise RowError(f"{where}: {_why_no_file(root / value, value)}", reason="missing image")
    return path


def _file_of(root: Path, value: str) -> Path | None:
    """Return the file of a path, also where they differ in how accents are written: in one character or in two."""
    for name in dict.fromkeys((value, unicodedata.normalize("NFC", value), unicodedata.normalize("NFD", value))):
        with suppress(OSError, ValueError):  # too long for a name, or with characters that none may have
            if (root / name).is_file():
                return root / name
    return None


def _why_no_file(path: Path, value: str) -> str:
    if len(value) > 255 and _BASE64.fullmatch(value):
        return (
            f"an image is the path of its file; {brief(value, 60)} looks like base64. Save the image as a file beside "
            "the rows, or keep images in Parquet"
        )
    with suppress(OSError, ValueError):
        if path.is_dir():
            return f"the image {plain(str(path))} does not exist: it is a folder"
    return f"the image {plain(str(path))} does not exist"
