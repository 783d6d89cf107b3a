"""A family of dual encoders: one tower embeds pictures, one texts, and what belongs together lies close."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from transformers import AutoModel

from finetune.families.base import Family

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from PIL.Image import Image
    from torch import Tensor, nn
    from transformers import ProcessorMixin

    from finetune.interfaces import PaddingSide


class DualEncoderFamily(Family):
    """Embeds pictures and texts. Subclasses set ``model_type`` and ``tower_paths``.

    Their models have a ``logit_scale``, the logarithm of what cosines are multiplied by; it stays frozen.
    """

    architecture = "dual_encoder"
    auto_class = AutoModel

    def encode(
        self,
        processor: ProcessorMixin,
        texts: Sequence[str],
        images: Sequence[list[Image]],
        *,
        padding_side: PaddingSide,
    ) -> dict[str, Tensor]:
        """Returns input_ids and attention_mask [texts, T] and pixel_values [pictures, 3, H, W].

        Texts and pictures need not be as many, and either may be none: each text is held against each picture.
        """
        batch = processor(
            text=list(texts) or None,
            images=[image for row in images for image in row] or None,
            padding=True,
            padding_side=padding_side,
            return_tensors="pt",
        )
        return dict(batch)

    def outputs(self, model: nn.Module, inputs: Mapping[str, Tensor]) -> Tensor:
        """Returns the embeddings of each row's picture and text, of length 1: [B, 2, D]."""
        out = model(**inputs)
        return torch.stack([out.image_embeds, out.text_embeds], dim=1)
