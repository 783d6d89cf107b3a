"""Looking at every picture before the first step: each file is read through once, and remembered until it changes."""

from __future__ import annotations

import hashlib
import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from finetune.cache import Notes, file_key
from finetune.data.images import no_bomb_warnings, read_through, refuse_over_cap
from finetune.errors import RowError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from finetune.data.bad_rows import BadRows
    from finetune.example import Example, ImageSource

Size = tuple[int, int]  # upright width and height in pixels
_SIZES = "picture_sizes.sqlite"


def check_pictures(examples: Sequence[Example], bad: BadRows, *, max_pixels: int) -> list[Example]:
    """Returns the rows all of whose pictures can be read; the others go to ``bad``."""
    found = picture_sizes([source for example in examples for source in example.images], max_pixels=max_pixels)
    looked_at = iter(found)
    good = []
    for example in examples:
        sizes = [next(looked_at) for _ in example.images]
        error = next((size for size in sizes if isinstance(size, RowError)), None)
        if error is None:
            good.append(example)
        else:
            bad.note(RowError(f"row {example.id}: {error}", reason=error.reason))
    return good


def picture_sizes(sources: Sequence[ImageSource], *, max_pixels: int) -> list[Size | RowError]:
    """Reads pictures through, each once, and returns in order the size of each, or why it cannot be used.

    Args:
        sources: where they are.
        max_pixels: width x height above which one is refused before it is decoded.
    """
    notes = Notes(_SIZES)
    keys = [_key(source) for source in sources]
    known = notes.get({key for key in keys if key})
    sizes: dict[str, Size | RowError] = {}
    left: dict[str, ImageSource] = {}
    for key, source in zip(keys, sources, strict=True):
        if key in known:
            width, _, height = known[key].partition("x")
            sizes[key] = _capped((int(width), int(height)), source, max_pixels)
        elif key:
            left[key] = source

    def look(source: ImageSource) -> Size | RowError:
        try:
            return read_through(source, max_pixels=max_pixels)
        except RowError as error:
            return error

    with no_bomb_warnings(), ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
        fresh = dict(zip(left, pool.map(look, left.values()), strict=True))
        found = [fresh.get(key) or sizes.get(key) or look(source) for key, source in zip(keys, sources, strict=True)]
    notes.put({key: f"{size[0]}x{size[1]}" for key, size in fresh.items() if not isinstance(size, RowError)})
    return found


def _capped(size: Size, source: ImageSource, max_pixels: int) -> Size | RowError:
    """Returns the size of a picture that a run with another cap has seen, or the fault it is for this one."""
    try:
        refuse_over_cap(size, max_pixels, str(source) if not isinstance(source, bytes) else "the picture")
    except RowError as error:
        return error
    return size


def _key(source: ImageSource) -> str:
    """Returns what a picture is remembered by; nothing where looking is as cheap, or where there is no file."""
    if isinstance(source, np.ndarray):
        return ""
    if isinstance(source, bytes):
        return hashlib.sha256(source).hexdigest()
    try:
        return file_key(source) if isinstance(source, Path) else source.key()
    except OSError:
        return ""
