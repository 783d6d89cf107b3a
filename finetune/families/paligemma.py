"""PaliGemma, versions 1 and 2, with bidirectional attention on the prefix and causal attention on the answer."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from finetune.families.image_text_to_text import ImageTextToTextFamily

if TYPE_CHECKING:
    from collections.abc import Sequence

    from PIL.Image import Image
    from torch import Tensor

    from finetune.interfaces import PaddingSide


class PaliGemmaFamily(ImageTextToTextFamily):
    """Siglip tower, linear projector, Gemma.

    Rows have the layout of the pretraining: images, ``<bos>``, question, newline, answer, ``<eos>``
    (https://github.com/google-research/big_vision/blob/main/big_vision/configs/proj/paligemma/README.md).
    """

    model_type = "paligemma"
    tower_paths = {
        "language": ("model.language_model",),
        "projector": ("model.multi_modal_projector",),
        "vision": ("model.vision_tower",),
    }
    processor_adds_marks = True
    chat_template = (
        "{% for message in messages %}{% if message['content'] is not string %}{% for part in message['content'] %}"
        "{% if part['type'] == 'image' %}<image>{% endif %}{% endfor %}{% endif %}{% endfor %}{{ bos_token }}"
        "{% for message in messages %}"
        "{% if message['content'] is string %}{{ message['content'] }}"
        "{% else %}{% for part in message['content'] %}"
        "{% if part['type'] == 'text' %}{{ part['text'] }}{% endif %}{% endfor %}{% endif %}"
        "{% if message['role'] == 'assistant' %}{{ eos_token }}{% else %}{{ '\n' }}{% endif %}{% endfor %}"
    )

    def _encode(
        self, processor: Any, texts: Sequence[str], images: list[list[Image]], padding_side: PaddingSide
    ) -> dict[str, Any]:
        """Return input_ids, attention_mask and token_type_ids [B, T], which mark all tokens as prefix, and the images.

        The processor itself would add a second ``<bos>`` and a newline to texts that already have them.
        """
        flat = [image for row in images for image in row]
        processed, replacements = processor._process_images(flat, return_tensors="pt") if flat else ({}, [])
        expanded, _ = processor.get_text_with_replacements(list(texts), replacements)
        inputs = processor.tokenizer(
            expanded,
            padding=True,
            padding_side=padding_side,
            add_special_tokens=False,
            return_token_type_ids=False,
            return_tensors="pt",
        )
        return {**inputs, "token_type_ids": torch.zeros_like(inputs["input_ids"]), **processed}

    def mark_supervised(self, inputs: dict[str, Tensor], labels: Tensor) -> dict[str, Tensor]:
        """End the prefix of each row at its first answer, since tokens of the prefix attend to later ones."""
        supervised = (labels != -100).cumsum(dim=1) > 0  # [B, T]
        return inputs | {"token_type_ids": supervised.to(inputs["token_type_ids"].dtype)}
