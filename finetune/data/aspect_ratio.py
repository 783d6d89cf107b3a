"""Thin images, of which a processor makes long strips if it scales the shorter side to a fixed length."""

from __future__ import annotations

from typing import TYPE_CHECKING

from finetune.errors import RowError

if TYPE_CHECKING:
    from transformers import ProcessorMixin

MOST_ASPECT = 200  # longer side to shorter side, of any image; Qwen's processors take no more
MOST_RESIZED_PIXELS = 4_000_000  # width x height after resizing, before most of a strip is cropped away


def most_aspect(processor: ProcessorMixin) -> int:
    """Return the largest ratio of an image's longer side to its shorter side for the image processor of a base.

    A processor with ``size: {"shortest_edge": E}`` alone, such as CLIP's, makes E x (E * aspect) pixels of an image
    however small it is. All others bound the size of what they make.
    """
    size = getattr(processor.image_processor, "size", None)
    size = {key: value for key, value in dict(size or {}).items() if value is not None}
    edge = size.get("shortest_edge")
    if edge is None or size.keys() != {"shortest_edge"}:
        return MOST_ASPECT
    return max(1, min(MOST_ASPECT, MOST_RESIZED_PIXELS // edge**2))


def refuse_aspect(size: tuple[int, int], name: str, most: int = MOST_ASPECT) -> None:
    """Refuse an image one side of which is far longer than the other.

    Args:
        size: the width and height of the image in pixels.
        name: the name of the image in the error.
        most: the largest ratio of the longer side to the shorter side.

    Raises:
        RowError: it is.
    """
    width, height = size
    if max(size) > most * max(1, min(size)):
        raise RowError(
            f"{name}: {width} x {height}: one side is over {most} times as long as the other, which the image "
            "processor cannot use. Crop it.",
            reason="extreme aspect ratio",
        )
