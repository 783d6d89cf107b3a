"""A generative family: a class of `AutoModelForImageTextToText`; a family's file states only what differs."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

from transformers import AutoModelForImageTextToText

from finetune.errors import ModelError
from finetune.families.base import Family

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from PIL.Image import Image
    from torch import Tensor, nn
    from transformers import ProcessorMixin

    from finetune.interfaces import Kind, PaddingSide


class ImageTextToTextFamily(Family):
    """Writes an answer about pictures. Subclasses set ``model_type`` and ``tower_paths``."""

    kind: ClassVar[Kind] = "generative"
    auto_class = AutoModelForImageTextToText
    chat_template: ClassVar[str | None] = None  # for bases that come without one

    def check_processor(self, processor: ProcessorMixin, name_or_path: str) -> None:
        """Gives a processor without a chat template the family's own.

        Raises:
            ModelError: there is none.
        """
        if processor.chat_template is None:
            if self.chat_template is None:
                raise ModelError(f"{name_or_path}: its processor has no chat template, so no question can be put")
            processor.chat_template = self.chat_template

    def encode(
        self,
        processor: ProcessorMixin,
        texts: Sequence[str],
        images: Sequence[list[Image]],
        *,
        padding_side: PaddingSide,
    ) -> dict[str, Tensor]:
        """Returns input_ids and attention_mask [B, T] and the tensors of the pictures."""
        nested = [list(row) for row in images]
        batch = processor(
            text=list(texts),
            images=nested if any(nested) else None,
            padding=True,
            padding_side=padding_side,
            add_special_tokens=False,
            return_tensors="pt",
        )
        return dict(batch)

    def mark_learnt(self, inputs: dict[str, Tensor], labels: Tensor) -> dict[str, Tensor]:
        """Returns the inputs of a training batch, told which tokens are learnt where the model must know it.

        Args:
            inputs: from ``encode``.
            labels: [B, T], -100 where nothing is learnt.
        """
        return inputs

    def outputs(self, model: nn.Module, inputs: Mapping[str, Tensor]) -> Tensor:
        """Returns the logits [B, T, V]."""
        return model(**inputs, use_cache=False).logits
