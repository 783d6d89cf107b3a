"""Opening pictures: any mode and orientation becomes upright RGB; a picture too large to decode safely is refused."""

import hashlib
import io
import warnings
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from finetune.errors import DataError
from finetune.example import ImageSource


def open_image(source: ImageSource, *, max_pixels: int = 50_000_000, name: str | None = None) -> Image.Image:
    """Returns the picture as upright RGB.

    Args:
        source: a file, its bytes, or pixels [H, W, 3] uint8.
        max_pixels: width x height above which the picture is refused before it is decoded.
        name: what to call the picture in errors; the path by default.

    Raises:
        DataError: it is missing, unreadable, truncated or too large.
    """
    if isinstance(source, np.ndarray):
        return Image.fromarray(source)
    name = name or (str(source) if isinstance(source, Path) else "the picture")
    try:
        with warnings.catch_warnings():
            # The cap below is ours, and an error; PIL's is a warning at another size.
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            with Image.open(io.BytesIO(source) if isinstance(source, bytes) else source) as file:
                width, height = file.size
                if width * height > max_pixels:
                    raise DataError(
                        f"{name}: {width} x {height} is over the cap of {max_pixels} pixels. Shrink it, or raise "
                        "data.max_image_pixels."
                    )
                return _upright_rgb(file)
    except FileNotFoundError:
        raise DataError(f"{name}: no such file") from None
    except (OSError, UnidentifiedImageError, Image.DecompressionBombError, SyntaxError, ValueError) as error:
        if isinstance(error, DataError):
            raise
        raise DataError(f"{name}: not a readable picture: {error}") from None


def as_source(image: Any) -> ImageSource:
    """Returns a picture from an app, a path, bytes, a PIL image or pixels [H, W, 3] uint8, as an ImageSource.

    Raises:
        DataError: it is none of these.
    """
    if isinstance(image, Image.Image):
        return np.asarray(_upright_rgb(image))
    if isinstance(image, str):
        return Path(image)
    if isinstance(image, np.ndarray) and (image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3):
        raise DataError(f"pixels must be uint8 [H, W, 3], not {image.dtype} {list(image.shape)}")
    if isinstance(image, Path | bytes | np.ndarray):
        return image
    raise DataError(f"a picture is a path, bytes, a PIL image or a uint8 array [H, W, 3], not {type(image).__name__}")


def _upright_rgb(image: Image.Image) -> Image.Image:
    if image.mode in ("I;16", "I;16B", "I;16L", "I"):  # 16-bit grey: PIL's own conversion would clip at 255
        image = Image.fromarray((np.asarray(image).astype(np.float64) / 257).round().clip(0, 255).astype(np.uint8))
    return ImageOps.exif_transpose(image).convert("RGB")


def image_digest(source: ImageSource) -> str:
    """Returns the SHA-256 of the picture's file, bytes or pixels."""
    if isinstance(source, Path):
        with source.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    if isinstance(source, bytes):
        return hashlib.sha256(source).hexdigest()
    return hashlib.sha256(repr(source.shape).encode() + source.tobytes()).hexdigest()
