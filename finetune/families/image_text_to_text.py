"""Generative families: classes of `AutoModelForImageTextToText`; the file of a family holds only its differences."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar

from transformers import AutoModelForImageTextToText

from finetune.core.batch import Features
from finetune.errors import ModelError
from finetune.families.base import Family
from finetune.families.features import image_step, images_of, places, processor_of, with_stored_outputs

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from PIL.Image import Image
    from torch import Tensor, nn
    from transformers import ProcessorMixin

    from finetune.core.batch import ImageStep, Rendered
    from finetune.interfaces import PaddingSide


class ImageTextToTextFamily(Family):
    """The base class of families that generate text. Subclasses set ``model_type`` and ``tower_paths``."""

    architecture = "generative"
    auto_class = AutoModelForImageTextToText
    chat_template: ClassVar[str | None] = None  # for bases without a template
    processor_adds_marks: ClassVar[bool] = False  # True if it adds the first token and a line break itself

    def check_processor(self, processor: ProcessorMixin, name_or_path: str) -> None:
        """Set the family's chat template on a processor without one.

        Raises:
            ModelError: the family has none either.
        """
        if processor.chat_template is None:
            if self.chat_template is None:
                raise ModelError(
                    f"{name_or_path}: the processor must have a chat template, and has none. Add chat_template.jinja "
                    "to the folder of the base."
                )
            processor.chat_template = self.chat_template

    def encode(
        self, processor: ProcessorMixin, rows: Sequence[Rendered], *, padding_side: PaddingSide
    ) -> dict[str, Any]:
        """Return input_ids and attention_mask [B, T] and the tensors of the images.

        Args:
            processor: the processor of the model.
            rows: the rows, each with a text; either all rows with images have features instead, or none has.
            padding_side: the side on which shorter rows are padded.

        Raises:
            ModelError: a row has a medium that is not an image.
        """
        texts = [row.text for row in rows if row.text is not None]
        assert len(texts) == len(rows), "a generative base is given conversations"
        features = [medium for row in rows for medium in row.media if isinstance(medium, Features)]
        if not features:
            return self._encode(processor, texts, [images_of(row) for row in rows], padding_side)
        inputs = self._encode(processor_of(processor, features), texts, [places(row) for row in rows], padding_side)
        return with_stored_outputs(inputs, features)

    def _encode(
        self, processor: Any, texts: Sequence[str], images: list[list[Image]], padding_side: PaddingSide
    ) -> dict[str, Any]:
        """Return the processor's inputs for ``texts`` and ``images``."""
        batch = processor(
            text=list(texts),
            images=images if any(images) else None,
            padding=True,
            padding_side=padding_side,
            add_special_tokens=False,
            return_tensors="pt",
        )
        return dict(batch)

    def image_step(self, processor: ProcessorMixin, images: list[Image]) -> ImageStep:
        """Process the images of one row.

        Raises:
            ModelError: the processor has no image step of its own.
        """
        text = processor.image_token * len(images)  # type: ignore[attr-defined]

        def encode(recorder: ProcessorMixin) -> dict[str, Any]:
            return self._encode(recorder, [text], [images], "right")

        return image_step(processor, encode)

    def mark_supervised(self, inputs: dict[str, Tensor], labels: Tensor) -> dict[str, Tensor]:
        """Return the inputs of a training batch, with marks of the supervised tokens if the model needs them.

        Args:
            inputs: the inputs, from ``encode``.
            labels: the labels, [B, T], -100 at tokens that are not supervised.
        """
        return inputs

    def outputs(self, model: nn.Module, inputs: Mapping[str, Tensor]) -> Tensor:
        """Return the logits [B, T, V]."""
        return model(**inputs, use_cache=False).logits
