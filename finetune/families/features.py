"""Rows with stored features in the place of images: the processor's part of them, and the inputs of the model.

The processor handles the text as usual and gets the stored outputs of its image step. So the ids of a row stay the same
for every family. The pixels are hollow: ``finetune.training.replay`` has the frozen modules that read them return
their stored outputs.
"""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING, Any

import torch
from PIL import Image
from torch import Tensor

from finetune.core.batch import STORED_OUTPUTS, Features, ImageStep
from finetune.core.hollow import hollow, is_hollow, join
from finetune.errors import ModelError

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from transformers import ProcessorMixin

    from finetune.core.batch import Rendered

    Encode = Callable[[ProcessorMixin], dict[str, Any]]

_PIXELS = "pixel_"  # prefix of the names of inputs with pixels or masks of pixels
_PLACE = Image.new("RGB", (32, 32))  # an image to count, whose pixels are not read


def image_step(processor: ProcessorMixin, encode: Encode) -> ImageStep:
    """Process the images of one row.

    Args:
        processor: the processor of the model.
        encode: the function that makes the inputs of a row of these images with a given processor.

    Raises:
        ModelError: the processor has no image step of its own.
    """
    recorder = _Recorder(processor)
    inputs = encode(recorder.processor)
    if recorder.seen is None:
        raise ModelError(f"{type(processor).__name__} must return the text that replaces an image, and does not")
    processed, replacements = recorder.seen
    return ImageStep(
        inputs=inputs,
        processed={name: _without_pixels(name, value) for name, value in processed.items()},
        replacements=tuple(replacements),
    )


def processor_of(processor: ProcessorMixin, rows: Sequence[Features]) -> ProcessorMixin:
    """Return a copy of the processor whose image step returns the stored outputs of ``rows``, in order."""
    twin: Any = copy.copy(processor)
    shown = [row for row in rows if row.replacements]
    processed = {name: _joined([row.processed[name] for row in shown]) for name in shown[0].processed} if shown else {}
    replacements = [text for row in shown for text in row.replacements]
    twin._process_images = lambda images, **kwargs: (processed, replacements)
    return twin


def images_of(row: Rendered) -> list[Image.Image]:
    """Return the images of a row.

    Raises:
        ModelError: the row has another medium, or features.
    """
    for medium in row.media:
        if not isinstance(medium, Image.Image):
            raise ModelError(
                f"each medium of a row must be an image, got {type(medium).__name__} (row {row.text!r:.80})"
            )
    return list(row.media)  # type: ignore[arg-type]


def places(row: Rendered) -> list[Image.Image]:
    """Return a placeholder for each image of a row, to count them; the row may have features instead."""
    parts = [medium.replacements if isinstance(medium, Features) else (medium,) for medium in row.media]
    return [_PLACE for part in parts for _ in part]


def with_stored_outputs(inputs: Mapping[str, Any], rows: Sequence[Features]) -> dict[str, Any]:
    """Return a batch's inputs with the joined outputs of the frozen modules of ``rows``, in order.

    Outputs with an entry for each token become [B, T, ...], zero at padding; of other outputs, the entries of the rows
    stand one after the other.
    """
    stored: dict[str, list[Tensor]] = {}
    per_token = rows[0].per_token
    for name in dict.fromkeys(name for row in rows for name in row.outputs):
        found = [row.outputs[name] for row in rows if name in row.outputs]
        one_by_one = zip(*found, strict=True)  # each tensor of the output, with its value in every row
        if name in per_token:
            stored[name] = [_padded(parts, inputs["attention_mask"]) for parts in one_by_one]
        else:
            stored[name] = [join(parts) for parts in one_by_one]
    return {**inputs, STORED_OUTPUTS: stored}


class _Recorder:
    """A processor that records the outputs of its image step."""

    def __init__(self, processor: Any):
        self.processor = copy.copy(processor)
        self.seen: tuple[dict[str, Any], list[str]] | None = None

        def process(images: Any, **kwargs: Any) -> Any:
            made, replacements = type(processor)._process_images(self.processor, images, **kwargs)
            self.seen = (dict(made), list(replacements))
            return made, replacements

        self.processor._process_images = process


def _padded(rows: Sequence[Tensor], attention_mask: Tensor) -> Tensor:
    """Return [1, T_i, ...] of each row as [B, T, ...], where T_i is the number of real tokens of a row."""
    if all(map(is_hollow, rows)):
        return hollow((*attention_mask.shape, *rows[0].shape[2:]), rows[0].dtype)
    padded = rows[0].new_zeros(*attention_mask.shape, *rows[0].shape[2:])
    padded[attention_mask.bool()] = torch.cat([row[0] for row in rows])
    return padded


def _without_pixels(name: str, value: Any) -> Any:
    """Return an output of the image step with pixels of ones; a mask with other values stays as it is."""
    if isinstance(value, list):
        if name.startswith(_PIXELS):
            raise ModelError(f"the image step of the processor must return {name} as a tensor, got a list")
        return value
    tensor = torch.as_tensor(value)
    if not name.startswith(_PIXELS) or not (tensor.is_floating_point() or bool((tensor == 1).all())):
        return tensor
    return hollow(tensor.shape, tensor.dtype, 1)  # not zero, which marks the filling of a batch


def _joined(values: list[Any]) -> Any:
    return join(values) if isinstance(values[0], Tensor) else [part for value in values for part in value]
