"""Images of more than 8 bits, and the range of values that becomes black to white.

A scanner's 12-bit values in a 16-bit file go up to 4095 of 65535: read as 16 bits, they are black. A run decides the
range once for a data set, from the highest value of its training rows, and the manifest keeps it. A range for each
image would lose the meaning of absolute values.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from finetune.errors import DataError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from PIL import Image

    from finetune.core.example import Example
    from finetune.recipe import ReadSection

FULL_RANGE = (0, 65535)
DEEP_MODES = ("I;16", "I;16B", "I;16L", "I;16N", "I")
DEEP_TYPES = (np.uint16, np.int16, np.int32)  # types of values [H, W]
_DEPTHS = (10, 12, 14, 16)  # bits of scanners and cameras
VALUES = "image_values"  # in the meta of a row: (lowest, highest) value of its images of more than 8 bits
COLORS = "image_colors"  # in the meta of a row: the highest value of its colour images of 16 bits a channel


def values_of(image: Image.Image) -> tuple[int, int] | None:
    """Return the lowest and the highest value of a grey image of more than 8 bits; None for any other image."""
    if image.mode not in DEEP_MODES:
        return None
    pixels = np.asarray(image)
    return int(pixels.min()), int(pixels.max())


def is_deep_color(image: Image.Image) -> bool:
    """Return whether a file has 16 bits a channel, of which PIL reads the upper 8; the file must not be loaded yet."""
    return image.mode not in DEEP_MODES and ";16" in str([tile.args for tile in getattr(image, "tile", ())])


def to_8_bit(pixels: np.ndarray, image_range: tuple[int, int] | None) -> np.ndarray:
    """Return values [H, W] as uint8: the range goes from black to white, and other values are clipped to it.

    Raises:
        ValueError: if no range is given, and no bit depth holds the values.
    """
    low, high = image_range or range_of(int(pixels.min()), int(pixels.max()))
    scaled = (pixels.astype(np.float64) - low) / (high - low) * 255
    return scaled.round().clip(0, 255).astype(np.uint8)


def range_of(lowest: int, highest: int) -> tuple[int, int]:
    """Return the range of the smallest usual bit depth that holds the values.

    Raises:
        ValueError: if none holds them.
    """
    bits = next((bits for bits in _DEPTHS if highest < 2**bits), None)
    if bits is None or lowest < 0:
        raise ValueError(
            f"pixel values must fit in 10 to 16 bits (0 to 65535), got values from {lowest} to {highest}. Set the "
            "values that become black and white with data.image_range=[LOW, HIGH]."
        )
    return 0, 2**bits - 1


def decide_range(
    section: ReadSection, examples: Iterable[Example], *, what: str, log: Callable[[str], None]
) -> tuple[int, int] | None:
    """Return the range by which the images of some rows are scaled; None if all images have 8 bits.

    Args:
        section: the section with the range, or with ``auto`` to decide it from the rows.
        examples: the rows, whose images have been checked.
        what: the name of the rows in errors and in the log.
        log: the function that logs the decision, and the number of rows with values outside the range.

    Raises:
        DataError: if the rows decide and no bit depth holds their values, or if colours would have to be scaled.
    """
    metas = [example.meta for example in examples]
    found = [meta[VALUES] for meta in metas if VALUES in meta]
    colors = [meta[COLORS] for meta in metas if COLORS in meta]
    decided = fixed_range(section)
    _check_colors(section, colors, what)
    if not found:
        return decided
    lowest, highest = min(low for low, _ in found), max(high for _, high in found)
    if section.image_range == "auto":
        try:
            decided = range_of(lowest, highest)
        except ValueError as error:
            raise DataError(f"{what} rows, images of more than 8 bits: {error}") from None
    assert decided is not None
    outside = sum(low < decided[0] or high > decided[1] for low, high in found)
    also = f" {outside} of them have values outside this range, which are clipped." if outside else ""
    log(
        f"image range: {len(found)} {what} rows have images of more than 8 bits, with values from {lowest} to "
        f"{highest}; {decided[0]} becomes black and {decided[1]} white (data.image_range: {_option(section)}).{also}"
    )
    return decided


def fixed_range(section: ReadSection) -> tuple[int, int] | None:
    """Return the range that a recipe sets; None if the rows decide it."""
    if isinstance(section.image_range, str):
        return FULL_RANGE if section.image_range == "file" else None
    low, high = section.image_range
    return low, high


def _check_colors(section: ReadSection, colors: list[int], what: str) -> None:
    if not colors or section.image_range == "file":
        return
    if section.image_range == "auto" and max(colors) >= 2**14:
        return
    raise DataError(
        f"{what} rows: colours are not scaled (data.image_range: {_option(section)}), got {len(colors)} rows with "
        f"colour images of 16 bits a channel and values up to {max(colors)} of 65535. Save them in 8 bit, or keep "
        "their values with data.image_range=file."
    )


def _option(section: ReadSection) -> Any:
    return section.image_range if isinstance(section.image_range, str) else list(section.image_range)
