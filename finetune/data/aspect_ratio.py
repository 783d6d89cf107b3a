"""A bound for thin images: a processor that scales the shorter side to a fixed length makes long strips of them."""

from __future__ import annotations

from typing import TYPE_CHECKING

from finetune.errors import RowError

if TYPE_CHECKING:
    from transformers import ProcessorMixin

MOST_ASPECT = 200  # longer side to shorter side, of any image; Qwen's processors take no more
MOST_RESIZED_PIXELS = 4_000_000  # width x height after resizing, before most of a strip is cropped away


def most_aspect(processor: ProcessorMixin) -> int:
    """Return the largest ratio of an image's longer side to its shorter side for the image processor of a base.

    A processor with ``size: {"shortest_edge": E}`` alone, such as CLIP's, scales every image to E x (E * aspect)
    pixels, even a small one. All other processors bound the size of the scaled image.
    """
    size = getattr(processor.image_processor, "size", None)
    size = {key: value for key, value in dict(size or {}).items() if value is not None}
    edge = size.get("shortest_edge")
    if edge is None or size.keys() != {"shortest_edge"}:
        return MOST_ASPECT
    return max(1, min(MOST_ASPECT, MOST_RESIZED_PIXELS // edge**2))


def refuse_aspect(size: tuple[int, int], name: str, most: int = MOST_ASPECT) -> None:
    """Refuse an image with one side that is far longer than the other.

    Args:
        size: the width and height of the image in pixels.
        name: the name of the image in the error.
        most: the largest ratio of the longer side to the shorter side.

    Raises:
        RowError: if the longer side is more than ``most`` times as long as the shorter side.
    """
    width, height = size
    if max(size) > most * max(1, min(size)):
        raise RowError(
            f"{name}: the longer side of an image must be at most {most} times as long as the shorter side, got "
            f"{width} x {height}. Crop the image.",
            reason="extreme aspect ratio",
        )
