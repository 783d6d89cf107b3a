"""A family of dual encoders: one tower embeds images, one embeds texts, and matching pairs have close embeddings."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from transformers import AutoModel

from finetune.families.base import Family
from finetune.families.features import images_of

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from torch import Tensor, nn
    from transformers import ProcessorMixin

    from finetune.core.batch import Rendered
    from finetune.interfaces import PaddingSide


class DualEncoderFamily(Family):
    """The base class of families that embed images and texts. Subclasses set ``model_type`` and ``tower_paths``.

    Their models have a ``logit_scale``, the logarithm of the factor on cosines; it stays frozen.
    """

    architecture = "dual_encoder"
    auto_class = AutoModel

    def encode(
        self, processor: ProcessorMixin, rows: Sequence[Rendered], *, padding_side: PaddingSide
    ) -> dict[str, Any]:
        """Return input_ids and attention_mask [texts, T] and pixel_values [images, 3, H, W].

        The numbers of texts and images may differ, and either may be zero: each text is compared with each image.

        Raises:
            ModelError: a row has a medium that is not an image.
        """
        batch = processor(
            text=[row.text for row in rows if row.text is not None] or None,
            images=[image for row in rows for image in images_of(row)] or None,
            padding=True,
            padding_side=padding_side,
            return_tensors="pt",
        )
        return dict(batch)

    def outputs(self, model: nn.Module, inputs: Mapping[str, Tensor]) -> Tensor:
        """Return the embeddings of each row's image and text, of length 1: [B, 2, D]."""
        out = model(**inputs)
        return torch.stack([out.image_embeds, out.text_embeds], dim=1)
