"""Precomputed image features: the frozen tower's outputs for a row's images, which replace the images in a batch.

The processor handles the text as usual and gets the stored outputs of its image step. So the ids of a row stay the same
for every family.
"""

from __future__ import annotations

import copy
import inspect
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from PIL import Image
from torch import Tensor
from transformers.modeling_outputs import BaseModelOutputWithPooling

from finetune.core.batch import ImageFeatures
from finetune.errors import ModelError

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from transformers import PreTrainedModel, ProcessorMixin

    from finetune.core.batch import Rendered

    Encode = Callable[[ProcessorMixin], dict[str, Any]]

_PIXELS = "pixel_"  # prefix of the names of inputs with pixels or masks of pixels
_PLACE = Image.new("RGB", (32, 32))  # an image to count, whose pixels are not read


@dataclass
class TowerOutput(BaseModelOutputWithPooling):
    """The value that a model accepts as ``mm_encoder_outputs["image"]``.

    ``pooler_output`` is a list of tensors [tokens, D], one for each row, or one tensor [1, tokens, D], as in the model.
    """

    deepstack_features: list[list[Tensor]] | None = None  # layers of rows of tensors [tokens, D]


@torch.inference_mode()
def image_features(model: PreTrainedModel, processor: ProcessorMixin, encode: Encode) -> ImageFeatures:
    """Run the frozen vision tower and projector on the images of one row.

    Args:
        model: the base, in eval mode.
        processor: the processor of the model.
        encode: the function that makes the inputs of that row with a given processor.

    Raises:
        ModelError: the model or its processor does not support precomputed features.
    """
    tower: Any = getattr(model.base_model, "get_image_features", None)
    if tower is None or "mm_encoder_outputs" not in inspect.signature(model.forward).parameters:
        raise ModelError(f"{type(model).__name__} must accept image features (mm_encoder_outputs), and does not")
    recorder = _Recorder(processor)
    inputs = encode(recorder.processor)
    if recorder.seen is None:
        raise ModelError(f"{type(processor).__name__} must return the text that replaces an image, and does not")
    wanted = inspect.signature(tower).parameters
    given = {
        name: value.to(model.device, model.dtype) if value.is_floating_point() else value.to(model.device)
        for name, value in inputs.items()
        if name in wanted
    }
    out = tower(**given, return_dict=True)
    deepstack = getattr(out, "deepstack_features", None) or []
    if any(isinstance(layer, tuple) and layer and isinstance(layer[0], int) for layer in deepstack):
        raise ModelError(
            f"deepstack_features of {type(model).__name__} must be tensors for each layer, got pairs of index and "
            "tensors"
        )
    processed, replacements = recorder.seen
    return ImageFeatures(
        pooled=_flat(out.pooler_output),
        deepstack=tuple(_flat(layer) for layer in deepstack),
        as_list=not isinstance(out.pooler_output, Tensor),
        processed={name: _without_pixels(name, value) for name, value in processed.items()},
        replacements=tuple(replacements),
    )


def processor_of(processor: ProcessorMixin, rows: Sequence[ImageFeatures]) -> ProcessorMixin:
    """Return a copy of the processor whose image step returns the stored outputs of ``rows``, in order."""
    twin: Any = copy.copy(processor)
    processed = {name: _joined([row.processed[name] for row in rows]) for name in rows[0].processed}
    replacements = [text for row in rows for text in row.replacements]
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
    parts = [medium.replacements if isinstance(medium, ImageFeatures) else (medium,) for medium in row.media]
    return [_PLACE for part in parts for _ in part]


def features_as_inputs(inputs: Mapping[str, Any], rows: Sequence[ImageFeatures]) -> dict[str, Any]:
    """Return a batch's inputs with the features of ``rows``, in order, and without pixels."""
    pooled = [row.pooled for row in rows]
    deepstack = [[row.deepstack[layer] for row in rows] for layer in range(len(rows[0].deepstack))]
    output = TowerOutput(
        pooler_output=pooled if rows[0].as_list else torch.cat(pooled)[None],  # type: ignore[arg-type]
        deepstack_features=deepstack or None,
    )
    kept = {name: value for name, value in inputs.items() if not name.startswith(_PIXELS)}
    return {**kept, "mm_encoder_outputs": {"image": output}}


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


def _flat(features: Any) -> Tensor:
    """Return features, one tensor or one for each image, as [tokens, D]."""
    parts = [features] if isinstance(features, Tensor) else list(features)
    return torch.cat([part.reshape(-1, part.shape[-1]) for part in parts])


def _without_pixels(name: str, value: Any) -> Any:
    if name.startswith(_PIXELS):
        return torch.empty(len(value), 0)
    return value if isinstance(value, list) else torch.as_tensor(value)


def _joined(values: list[Any]) -> Any:
    return torch.cat(values) if isinstance(values[0], Tensor) else [part for value in values for part in value]
