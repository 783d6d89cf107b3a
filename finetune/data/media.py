"""The media of a row: the types that a base takes, and the function that opens them."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from finetune.data.images import open_image
from finetune.errors import RowError

if TYPE_CHECKING:
    from PIL.Image import Image

    from finetune.core.example import Example, ImageSource
    from finetune.interfaces import ModelFamily

OPENED = frozenset({"image"})  # the types of media that are opened here


def refuse_media(example: Example, family: ModelFamily) -> None:
    """Refuse a row with a medium that a base does not take, or that this package cannot open.

    Raises:
        RowError: if there is such a medium; the message names the row, the type of the medium and the family.
    """
    for number, type in enumerate(example.media_types, 1):
        if type not in family.media:
            raise RowError(
                f"row {example.id}: {family.model_type} takes {_listed(family.media)}, and medium {number} of the row "
                f"is of the type {type}. Leave such rows out, or use a base that takes them.",
                reason=f"{type} for a base that takes none",
            )
        if type not in OPENED:
            raise RowError(
                f"row {example.id}: this collator opens {_listed(OPENED)} only, and medium {number} of the row is of "
                f"the type {type}, which {family.model_type} takes. Leave such rows out.",
                reason=f"{type}, which is not opened",
            )


def refuse_unopened(example: Example) -> None:
    """Refuse a row with a medium of a type for which a manifest has no digests.

    Raises:
        RowError: if there is such a medium; the message names the row and the type of the medium.
    """
    for number, type in enumerate(example.media_types, 1):
        if type not in OPENED:
            raise RowError(
                f"row {example.id}: a manifest has digests of {_listed(OPENED)} only, and medium {number} of the row "
                f"is of the type {type}. Leave such rows out.",
                reason=f"{type}, which has no digest",
            )


def open_images(example: Example, *, max_pixels: int, max_aspect: int) -> list[Image]:
    """Open the images of a row, in order.

    Args:
        example: the row whose images are opened.
        max_pixels: the largest width x height in pixels; a larger image is refused before it is decoded.
        max_aspect: the largest ratio of an image's longer side to its shorter side.

    Raises:
        RowError: if an image cannot be used.
    """
    return [
        open_image(
            source,
            max_pixels=max_pixels,
            max_aspect=max_aspect,
            name=f"row {example.id}: {image_name(source)}",
            options=example.image_options,
        )
        for source in example.images
    ]


def image_name(source: ImageSource) -> str:
    """Return the name by which errors call an image."""
    return "its image" if isinstance(source, bytes | np.ndarray) else str(source)


def _listed(types: frozenset[str]) -> str:
    return f"media of the type {', '.join(sorted(types))}" if types else "no media"
