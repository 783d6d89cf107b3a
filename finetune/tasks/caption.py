"""Captioning: generated descriptions of images, compared with one or several references."""

from __future__ import annotations

import math
import random
from dataclasses import replace
from typing import TYPE_CHECKING, Literal, Self

from finetune.core.prediction import Text
from finetune.metrics.rouge_l import rouge_l
from finetune.recipe import CAPTION_QUESTION, PromptSection
from finetune.tables import CAPTION_METRICS
from finetune.tasks.generative import GenerativeTask

if TYPE_CHECKING:
    from collections.abc import Sequence

    from finetune.core.example import Example
    from finetune.core.prediction import Prediction
    from finetune.recipe.row import Row

_COMPARED = 100  # rows that are compared with each other for the constant caption


class CaptionConfig(PromptSection):
    """The section of the caption task. The adapter keeps it, and ``.caption`` uses it unchanged."""

    name: Literal["caption"]
    """The name of the task."""

    @property
    def own_question(self) -> str:
        """The question of rows without one: ``caption_question``, or the one that asks any base for a caption."""
        return self.caption_question or CAPTION_QUESTION

    def to_example(self, row: Row) -> Example:
        """Return the example of a row; its answers are captions, of which each epoch trains on one."""
        example = super().to_example(row)
        if row.supervised_field == "messages":
            return example
        return replace(example, captions=[self.text_of(text) for text in example.answers])

    def as_trained(self, *, caption_question: str | None = None) -> Self:
        """Return the section with its defaults written out."""
        return super().as_trained(caption_question=caption_question or self.own_question)


class CaptionTask(GenerativeTask):
    """The caption task: descriptions of images, any of which may have several references."""

    Config = CaptionConfig
    metrics = CAPTION_METRICS

    def constant(self, examples: Sequence[Example]) -> Prediction:
        """Return the first reference of a row that is closest to the references of all rows, by ROUGE-L.

        Hardly a caption occurs twice, so the most frequent one would be any of them. Of many rows, some are compared.
        """
        some = examples if len(examples) <= _COMPARED else random.Random(0).sample(examples, _COMPARED)
        texts = dict.fromkeys(example.answers[0] for example in some)
        closest = max(texts, key=lambda text: math.fsum(rouge_l(text, example.answers) for example in some))
        return Text(text=closest)
