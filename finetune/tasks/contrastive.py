"""Choosing among texts: a base that embeds images and texts answers with the label whose text lies closest."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from finetune.example import texts_to_choose_from
from finetune.prediction import Prediction
from finetune.tasks.exact_match import ExactMatch

if TYPE_CHECKING:
    from torch import Tensor, nn
    from transformers import PreTrainedTokenizerBase

    from finetune.batch import Batch
    from finetune.recipe import ContrastiveSection


class ContrastiveTask(ExactMatch):
    """A prediction is the label whose text lies closest to the image.

    Args:
        options: of the recipe, or of the adapter.
        tokenizer: unused: a dual encoder writes no text.
    """

    options: ContrastiveSection

    def __init__(self, options: ContrastiveSection, tokenizer: PreTrainedTokenizerBase):
        self.options = options

    def outputs(self, model: nn.Module, batch: Batch) -> Tensor:
        """Return the fp32 embeddings [B, 2, D] of images and texts, of length 1."""
        out: Any = model(**batch.inputs)
        return torch.stack([out.image_embeds, out.text_embeds], dim=1).float()

    @torch.inference_mode()
    def predict(self, model: nn.Module, batch: Batch) -> list[Prediction]:
        """Return for each image the label, of those its row may be answered with, whose text lies closest."""
        similarity = model(**batch.inputs).logits_per_image  # [B, texts]
        column = {text: i for i, text in enumerate(texts_to_choose_from(batch.examples))}
        answers = []
        for row, example in zip(similarity, batch.examples, strict=True):
            labels = list(example.choices)
            closest = row[[column[example.choices[label]] for label in labels]].argmax()
            answers.append(Prediction(text=labels[int(closest)]))
        return answers

    @torch.inference_mode()
    def embed(self, model: nn.Module, batch: Batch) -> Tensor:
        """Returns the fp32 embeddings [rows, D], of length 1, of a batch of pictures alone or of texts alone."""
        plain: Any = model
        embed = plain.get_image_features if "pixel_values" in batch.inputs else plain.get_text_features
        return torch.nn.functional.normalize(embed(**batch.inputs).pooler_output.float(), dim=-1)
