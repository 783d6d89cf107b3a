"""Checks of every image before the first step: each is read once, and its facts are kept until its file changes."""

from __future__ import annotations

import hashlib
import json
import os
from concurrent.futures import ThreadPoolExecutor
from dataclasses import astuple, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from finetune.core.cache import Notes
from finetune.core.example import ImageOptions
from finetune.core.file_state import file_key, is_settled
from finetune.data.aspect_ratio import refuse_aspect
from finetune.data.bit_depth import COLORS, VALUES
from finetune.data.image_workers import image_workers
from finetune.data.images import ImageFacts, image_digest, refuse_over_cap
from finetune.errors import RowError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from finetune.core.example import Example, ImageSource
    from finetune.data.bad_rows import BadRows

Size = tuple[int, int]  # upright width and height in pixels
IMAGES = "image_digests"  # in the meta of a row: the digest of each of its images, in order
_NOTES = "images.sqlite"
_PLAIN = ImageOptions()


@dataclass(frozen=True)
class Seen:
    """The facts about an image that can be read."""

    size: Size
    digest: str  # SHA-256 of its file or bytes: the same for all rows of one image
    values: tuple[int, int] | None = None  # as ``ImageFacts`` has them
    colors: int | None = None

    @classmethod
    def of(cls, facts: ImageFacts, digest: str) -> Seen:
        """Return the facts about an image that are kept."""
        return cls(facts.size, digest, facts.values, facts.colors)


def facts_of(seen: Sequence[Seen]) -> dict[str, Any]:
    """Return the facts about a row's images that go into its meta."""
    if not seen:
        return {}
    meta: dict[str, Any] = {"image": seen[0].digest, IMAGES: [one.digest for one in seen]}
    if values := [one.values for one in seen if one.values]:
        meta[VALUES] = min(low for low, _ in values), max(high for _, high in values)
    if colors := [one.colors for one in seen if one.colors is not None]:
        meta[COLORS] = max(colors)
    return meta


def digests_of(example: Example) -> list[str]:
    """Return the digest of each image of a row, in order: those in its meta, else of the images as they are now."""
    noted: list[str] = example.meta.get(IMAGES, [])
    in_memory = any(isinstance(source, np.ndarray) for source in example.images)
    if in_memory or len(noted) != len(example.images):  # a grey image may have replaced one with a digest
        return [image_digest(source) for source in example.images]
    return noted


def check_images(
    examples: Sequence[Example], bad: BadRows, *, max_pixels: int, page: int | None = None
) -> list[Example]:
    """Return the rows whose images can all be read; note the others in ``bad``.

    Rows that begin with the same image get the same ``meta["image"]``, wherever the image is stored.
    """
    sources = [source for example in examples for source in example.images]
    found = iter(look_at(sources, max_pixels=max_pixels, page=page))
    good = []
    for example in examples:
        seen = [next(found) for _ in example.images]
        error = next((one for one in seen if isinstance(one, RowError)), None)
        if error is not None:
            bad.note(RowError(f"row {example.id}: {error}", reason=error.reason))
        else:
            known = [one for one in seen if isinstance(one, Seen)]
            good.append(replace(example, meta=example.meta | facts_of(known)) if known else example)
    return good


def image_sizes(sources: Sequence[ImageSource], *, max_pixels: int, page: int | None = None) -> list[Size | RowError]:
    """Return, in order, the size of each image, or the error that refuses it; of an array, only the shape is read."""
    files = [source for source in sources if not isinstance(source, np.ndarray)]
    found = iter(look_at(files, max_pixels=max_pixels, page=page))
    sizes: list[Size | RowError] = []
    for source in sources:
        one = Seen(source.shape[1::-1], "") if isinstance(source, np.ndarray) else next(found)
        sizes.append(one.size if isinstance(one, Seen) else one)
    return sizes


def look(source: ImageSource, *, max_pixels: int, page: int | None = None) -> Seen:
    """Read one image through in a process that can be killed, without noting it.

    Raises:
        RowError: if the image cannot be used.
    """
    if isinstance(source, np.ndarray):
        return Seen(source.shape[1::-1], image_digest(source))
    place = source if isinstance(source, Path | bytes) else source.read()
    name = "the image" if isinstance(source, bytes) else str(source)
    facts = image_workers().facts(place, max_pixels=max_pixels, name=name, page=page)
    return Seen.of(facts, image_digest(place))


def look_at(sources: Sequence[ImageSource], *, max_pixels: int, page: int | None = None) -> list[Seen | RowError]:
    """Read images through, each once, and return in order the facts about each, or the error that refuses it.

    Args:
        sources: the sources of the images.
        max_pixels: the largest width x height in pixels; a larger image is refused before it is decoded.
        page: the page of TIFF files, as in ``ImageOptions``.
    """
    notes = Notes(_NOTES)
    options = ImageOptions(page=page)
    keys = [source_key(source, options) for source in sources]
    known = notes.get({key for key in keys if key})
    found: dict[str, Seen | RowError] = {}
    left: dict[str, ImageSource] = {}
    lasting: set[str] = set()  # keys of images whose files are settled, so that a later change changes the key
    for key, source in zip(keys, sources, strict=True):
        if not key or key in found or key in left:
            continue
        if (seen := _noted(known.get(key))) is not None:
            found[key] = _capped(seen, source, max_pixels)
            continue
        left[key] = source
        if may_be_noted(source):
            lasting.add(key)

    def tried(source: ImageSource) -> Seen | RowError:
        try:
            return look(source, max_pixels=max_pixels, page=page)
        except RowError as error:
            return error

    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
        fresh = dict(zip(left, pool.map(tried, left.values()), strict=True))
        out = [fresh.get(key) or found.get(key) or tried(source) for key, source in zip(keys, sources, strict=True)]
    noted = {key: seen for key, seen in fresh.items() if isinstance(seen, Seen) and key in lasting}
    notes.put({key: json.dumps(astuple(seen)) for key, seen in noted.items()})
    return out


def _noted(note: str | None) -> Seen | None:
    """Return the facts that a run has noted about an image; None if there are none, or only of another release."""
    try:
        (width, height), digest, values, colors = json.loads(note or "null")
        return Seen((int(width), int(height)), str(digest), values and (int(values[0]), int(values[1])), colors)
    except (ValueError, TypeError, IndexError):
        return None


def _capped(seen: Seen, source: ImageSource, max_pixels: int) -> Seen | RowError:
    """Return the noted facts, or the error that refuses the image under the pixel cap of this run."""
    name = "the image" if isinstance(source, bytes) else str(source)
    try:
        refuse_aspect(seen.size, name)
        refuse_over_cap(seen.size, max_pixels, name)
    except RowError as error:
        return error
    return seen


def may_be_noted(source: ImageSource) -> bool:
    """Return whether facts that are read from an image after this call may be noted under its key."""
    try:
        return all(is_settled(path) for path in _files(source))
    except (OSError, ValueError):
        return False


def _files(source: ImageSource) -> Sequence[Path]:
    """Return the files that an image may be read from; none if its key is made of its bytes."""
    if isinstance(source, bytes | np.ndarray):
        return ()
    return (source,) if isinstance(source, Path) else source.files()


def source_key(source: ImageSource, options: ImageOptions = _PLAIN) -> str:
    """Return the key of an image's notes, which changes when the image may have changed; empty if there is no file.

    Args:
        source: the source of the image.
        options: the settings by which the image is opened.
    """
    key = _source_key(source)
    return key if options == _PLAIN or not key else f"{key}\0{options.range} {options.page}"


def _source_key(source: ImageSource) -> str:
    if isinstance(source, np.ndarray):
        return image_digest(source)
    if isinstance(source, bytes):
        return hashlib.sha256(source).hexdigest()
    try:
        return file_key(source) if isinstance(source, Path) else source.key()
    except (OSError, ValueError):  # a name that no file can have
        return ""
