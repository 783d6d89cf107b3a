"""The base class of tasks of a dual encoder: the prediction is the label whose text is closest to the image."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from finetune.core.example import texts_to_choose_from
from finetune.core.prediction import Label
from finetune.tasks.answers import AnswerTask

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor, nn
    from transformers import PreTrainedModel, PreTrainedTokenizerBase, ProcessorMixin

    from finetune.core.batch import Batch
    from finetune.core.example import Example
    from finetune.core.prediction import Prediction
    from finetune.interfaces import ModelFamily, TaskCollator
    from finetune.recipe import LabelSection, ReadSection


class ChoosingTask(AnswerTask):
    """A task whose prediction is the label with the text closest to the image. Importing this module loads no torch.

    Args:
        options: the section of the task, from the recipe or the adapter.
        tokenizer: the tokenizer of the base; unused, since a dual encoder writes no text.
    """

    options: LabelSection

    def __init__(self, options: LabelSection, tokenizer: PreTrainedTokenizerBase):
        self.options = options

    @staticmethod
    def collator(
        family: ModelFamily, model: PreTrainedModel, processor: ProcessorMixin, data: ReadSection | None
    ) -> TaskCollator:
        """Return the collator of pairs of an image and a text."""
        from finetune.data.pairs import PairCollator

        return PairCollator.of_base(family, model, processor, data)

    def outputs(self, model: nn.Module, batch: Batch) -> Tensor:
        """Return the fp32 embeddings [B, 2, D] of images and texts, of length 1."""
        import torch

        out: Any = model(**batch.inputs)
        return torch.stack([out.image_embeds, out.text_embeds], dim=1).float()

    def predict(self, model: nn.Module, batch: Batch) -> list[Prediction]:
        """Return for each image the label of its row's choices whose text is closest.

        The scores are the softmax over the row's own labels.
        """
        import torch

        with torch.inference_mode():
            similarity = model(**batch.inputs).logits_per_image  # [B, texts]
        column = {text: i for i, text in enumerate(texts_to_choose_from(batch.examples))}
        predictions: list[Prediction] = []
        for row, example in zip(similarity, batch.examples, strict=True):
            labels = list(example.choices)
            own = row[[column[example.choices[label]] for label in labels]]  # [labels]
            scores = dict(zip(labels, own.float().softmax(dim=0).tolist(), strict=True))
            predictions.append(Label(label=labels[int(own.argmax())], scores=scores))
        return predictions

    def constant(self, examples: Sequence[Example]) -> Prediction:
        """Return the most frequent label of these rows."""
        label = self.most_common_answer(examples)
        return Label(label=label, scores={label: 1.0})

    def embed(self, model: nn.Module, batch: Batch) -> Tensor:
        """Return the fp32 embeddings [rows, D], of length 1, of a batch of images alone or of texts alone."""
        import torch

        plain: Any = model
        embed = plain.get_image_features if "pixel_values" in batch.inputs else plain.get_text_features
        with torch.inference_mode():
            return torch.nn.functional.normalize(embed(**batch.inputs).pooler_output.float(), dim=-1)
