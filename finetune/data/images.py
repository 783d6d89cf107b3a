"""Opening images: every mode and orientation becomes upright RGB; an image that is too large is refused."""

import hashlib
import io
import re
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import ExifTags, Image, ImageOps, UnidentifiedImageError

from finetune.core import lfs
from finetune.core.example import ImageHandle, ImageOptions, ImageSource
from finetune.data.aspect_ratio import MOST_ASPECT, refuse_aspect
from finetune.data.bit_depth import DEEP_MODES, DEEP_TYPES, is_deep_color, to_8_bit, values_of
from finetune.data.pixels import is_array, pixels_of
from finetune.errors import DataError, FinetuneError, RowError

# PIL reads more formats: some start other programs (EPS), and some are not images (fonts, streams).
FORMATS = ("AVIF", "BMP", "GIF", "JPEG", "JPEG2000", "PNG", "PPM", "TIFF", "WEBP")
Image.init()  # PIL knows formats by name only once all of its readers are loaded
OVER_CAP = "image over the pixel cap"  # the reason of a row whose image has too many pixels
_PLAIN = ImageOptions()
MOST_SCANS = 100  # scans of a JPEG; encoders write about ten
_START_OF_SCAN, _END = b"\xff\xda", b"\xff\xd9"
# Inside the data of a scan, 0 or a restart mark follows 0xff.
_MARKER = re.compile(rb"\xff[^\x00\x01\xd0-\xd8\xff]")
_LYING = (5, 6, 7, 8)  # EXIF orientations that swap width and height


@dataclass(frozen=True, kw_only=True)
class ImageFacts:
    """The facts about an image that was read to its end.

    Attributes:
        size: the width and height of the upright image, in pixels.
        values: the lowest and highest value of a grey image of more than 8 bits; None for any other image.
        colors: the highest value of a colour image of 16 bits a channel, of which PIL reads the upper 8 bits; None for
            any other image.
    """

    size: tuple[int, int]
    values: tuple[int, int] | None = None
    colors: int | None = None


def open_image(
    source: ImageSource,
    *,
    max_pixels: int = 50_000_000,
    max_aspect: int = MOST_ASPECT,
    name: str | None = None,
    options: ImageOptions = _PLAIN,
) -> Image.Image:
    """Return the image as upright RGB; of an animation, return the first frame.

    Transparent parts become white, because the colour under full transparency is arbitrary, and mostly black. Grey of
    more than 8 bits is scaled to 8 bits.

    Args:
        source: the source of the image.
        max_pixels: the largest width x height in pixels; a larger image is refused before it is decoded.
        max_aspect: the largest ratio of the longer side to the shorter side.
        name: the name of the image in errors; its path by default.
        options: the settings by which the image is opened.

    Raises:
        RowError: if the image is missing, unreadable, truncated or too large.
    """
    if isinstance(source, np.ndarray):
        refuse_aspect(source.shape[1::-1], name or "the image", max_aspect)
        return Image.fromarray(source) if source.ndim == 3 else _scaled(source, options, name or "the image")
    with no_bomb_warnings(), _opened(source, max_pixels, name, options.page, max_aspect) as file:
        return _upright_rgb(file, options.range)


def read_pixels(
    source: Path | bytes, *, max_pixels: int = 50_000_000, name: str | None = None, page: int | None = None
) -> np.ndarray:
    """Return the upright pixels of an image as ``open_image`` does, but with all of their bits.

    Returns:
        [H, W, 3] uint8, or the values [H, W] of a grey image of more than 8 bits.

    Raises:
        RowError: as ``open_image``.
    """
    with no_bomb_warnings(), _opened(source, max_pixels, name, page) as file:
        return _pixels(file)


def read_through(
    source: ImageSource, *, max_pixels: int = 50_000_000, name: str | None = None, page: int | None = None
) -> ImageFacts:
    """Read the whole image once; call it inside ``no_bomb_warnings``.

    A header does not show whether the end of the file is missing. The whole stream of a JPEG is read, but only an
    eighth of its width and height is computed, which is much faster.

    Raises:
        RowError: as ``open_image``.
    """
    if isinstance(source, np.ndarray):
        return ImageFacts(size=(source.shape[1], source.shape[0]))
    with _opened(source, max_pixels, name, page) as file:
        deep_color = is_deep_color(file)  # must come before the file is loaded
        width, height = file.size
        if file.getexif().get(ExifTags.Base.Orientation) in _LYING:
            width, height = height, width
        if file.format in ("JPEG", "MPO"):
            file.draft("L", (1, 1))
        _refuse_floats(file)
        file.load()
        colors = None
        if deep_color:
            bands = file.getextrema()
            colors = 256 * max(high for _, high in bands if high is not None) + 255  # type: ignore[misc]
        return ImageFacts(size=(width, height), values=values_of(file), colors=colors)


def refuse_over_cap(size: tuple[int, int], max_pixels: int, name: str) -> None:
    """Raise RowError if width x height is over ``max_pixels``."""
    width, height = size
    if width * height > max_pixels:
        raise RowError(
            f"{name}: an image must have at most {max_pixels} pixels, got {width} x {height}. Shrink the image, or "
            "raise data.max_image_pixels.",
            reason=OVER_CAP,
        )


@contextmanager
def no_bomb_warnings() -> Iterator[None]:
    """Silence PIL's warning of large images: this module has its own limit, which raises an error.

    Warning filters belong to the whole process. Use this around threads, never inside one.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", Image.DecompressionBombWarning)
        yield


@contextmanager
def _opened(
    source: ImageSource, max_pixels: int, name: str | None, page: int | None = None, max_aspect: int = MOST_ASPECT
) -> Iterator[Image.Image]:
    """Open an image whose size is allowed; any error about the image inside the block becomes a RowError."""
    name = name or ("the image" if isinstance(source, bytes) else str(source))
    try:
        place = source if isinstance(source, Path | bytes) else source.read()  # type: ignore[union-attr]
        with Image.open(io.BytesIO(place) if isinstance(place, bytes) else place, formats=FORMATS) as file:
            _refuse_scans(file, place)
            _turn_to(file, page, name)
            refuse_aspect(file.size, name, max_aspect)
            refuse_over_cap(file.size, max_pixels, name)
            yield file
    except (FinetuneError, MemoryError):
        raise
    except FileNotFoundError:
        raise RowError(f"{name}: no such file. Check the path of the image.", reason="missing image") from None
    except Image.DecompressionBombError:  # PIL raises this before it returns the size
        raise RowError(
            f"{name}: an image must have at most twice PIL's own cap of {Image.MAX_IMAGE_PIXELS} pixels, got more. "
            "Shrink the image.",
            reason=OVER_CAP,
        ) from None
    except UnidentifiedImageError:
        if lfs.is_pointer(place if isinstance(place, bytes) else place.read_bytes()):
            raise RowError(f"{name}: {lfs.WAY_OUT}", reason="git-LFS pointer") from None
        raise RowError(
            f"{name}: not a readable image: its format must be one of {', '.join(FORMATS)}. Save it as PNG or JPEG.",
            reason="unreadable image",
        ) from None
    except Exception as error:  # PIL's readers raise almost any exception on damaged bytes
        what = str(error) or type(error).__name__
        raise RowError(f"{name}: not a readable image: {what}. Replace the file.", reason="unreadable image") from None


def as_source(image: Any) -> ImageSource:
    """Return an image from an app as an ImageSource.

    Args:
        image: the path, the bytes, a PIL image, pixels as ``pixels_of`` takes them, or the image of a row.

    Raises:
        DataError: if it is none of these, or a PIL image whose file cannot be read to its end.
    """
    if isinstance(image, Image.Image):
        try:
            return _pixels(image)
        except (OSError, ValueError, SyntaxError) as error:  # PIL reads a file when its pixels are used
            raise DataError(f"the PIL image cannot be read: {error}") from None
    if isinstance(image, np.ndarray) and image.ndim == 2 and image.dtype in DEEP_TYPES and image.size:
        return image
    if is_array(image):
        return pixels_of(image)
    if isinstance(image, str):
        return Path(image)
    if isinstance(image, Path | bytes | ImageHandle):
        return image
    raise DataError(
        "an image must be a path, bytes, a PIL image, or an RGB array of numpy or torch, "
        f"got {type(image).__module__}.{type(image).__qualname__}"
    )


def _refuse_scans(file: Image.Image, place: Path | bytes) -> None:
    """Refuse a JPEG with more scans than any encoder writes: each scan decodes the whole image again."""
    if file.format not in ("JPEG", "MPO"):
        return
    num_scans = _num_scans(place if isinstance(place, bytes) else place.read_bytes())
    if num_scans > MOST_SCANS:
        raise ValueError(f"a JPEG must have at most {MOST_SCANS} scans, got more. Save the image again.")


def _num_scans(data: bytes) -> int:
    """Return the number of scans of the first image of a JPEG; counting stops above ``MOST_SCANS``.

    Other segments, such as a preview, and data after the image, such as a film, do not count.
    """
    place, num_scans = 2, 0
    while num_scans <= MOST_SCANS and (found := _MARKER.search(data, place)):
        place = found.end()
        if found[0] == _END:
            break
        num_scans += found[0] == _START_OF_SCAN
        place += int.from_bytes(data[place : place + 2], "big")  # the length of the segment
    return num_scans


def _turn_to(file: Image.Image, page: int | None, name: str) -> None:
    """Go to the page of a TIFF; other files with several frames are animations, or hold a preview."""
    if file.format != "TIFF":
        return
    wanted = 2 if page is None else page
    try:
        file.seek(wanted - 1)
    except EOFError:
        if page is None:
            return
        raise RowError(
            f"{name}: data.image_page must be a page of the TIFF, got {page}, and the TIFF has fewer pages. Choose a "
            "smaller number.",
            reason="no such page",
        ) from None
    if page is None:
        raise RowError(
            f"{name}: a TIFF must have one page, or data.image_page must choose one, got several pages. Set "
            "data.image_page for all files, such as data.image_page=1, or save each page as an image.",
            reason="several pages",
        )


def _scaled(values: np.ndarray, options: ImageOptions, name: str) -> Image.Image:
    try:
        return Image.fromarray(to_8_bit(values, options.range)).convert("RGB")
    except ValueError as error:
        raise RowError(f"{name}: {error}", reason="values without a range") from None


def _pixels(image: Image.Image) -> np.ndarray:
    """Return [H, W, 3] uint8, or the values [H, W] of a grey image of more than 8 bits."""
    if image.mode in DEEP_MODES:
        return np.asarray(ImageOps.exif_transpose(image))
    return np.asarray(_upright_rgb(image))


def _upright_rgb(image: Image.Image, image_range: tuple[int, int] | None = None) -> Image.Image:
    _refuse_floats(image)
    image = ImageOps.exif_transpose(image)
    if image.mode in DEEP_MODES:  # PIL's own conversion would clip at 255
        image = Image.fromarray(to_8_bit(np.asarray(image), image_range))
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert("RGB")


def _refuse_floats(image: Image.Image) -> None:
    if image.mode == "F":
        raise ValueError(
            "pixels must be whole numbers, got floating-point numbers, which have no fixed range. Save the image in 8 "
            "or 16 bit."
        )


def image_digest(source: ImageSource) -> str:
    """Return the SHA-256 of the image's file, bytes or pixels."""
    if isinstance(source, np.ndarray):
        return hashlib.sha256(repr(source.shape).encode() + source.tobytes()).hexdigest()
    place = source if isinstance(source, Path | bytes) else source.read()
    if isinstance(place, bytes):
        return hashlib.sha256(place).hexdigest()
    with place.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
