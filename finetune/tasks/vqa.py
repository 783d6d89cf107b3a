"""Visual question answering: next-token loss on the answer, which is decoded greedily and compared as a whole."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from finetune.interfaces import LossSum
from finetune.prediction import Text
from finetune.tasks.answers import AnswerTask
from finetune.tasks.generation import generate_answers
from finetune.tasks.head import logits_at

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import nn
    from transformers import PreTrainedTokenizerBase

    from finetune.batch import Batch
    from finetune.example import Example
    from finetune.prediction import Prediction
    from finetune.recipe import VqaSection
    from finetune.tasks.generation import Answer, IsStopped, OnText


class VqaTask(AnswerTask):
    """One term, ``answer``; one prediction a row, decoded greedily."""

    options: VqaSection
    couples_rows = False

    def __init__(self, options: VqaSection, tokenizer: PreTrainedTokenizerBase):
        self.options, self.tokenizer = options, tokenizer

    def count_items(self, batch: Batch) -> dict[str, int]:
        """Returns how many tokens each term is a sum over, before any forward."""
        assert batch.targets is not None
        return {"answer": len(batch.targets.tokens)}

    def terms(self, model: nn.Module, batch: Batch) -> dict[str, LossSum]:
        """Returns the summed cross entropy, in nats, of the supervised tokens."""
        assert batch.targets is not None
        logits = logits_at(model, batch.inputs, batch.targets.predictors)  # [N, V]
        loss = torch.nn.functional.cross_entropy(logits.float(), batch.targets.tokens, reduction="sum")
        return {"answer": LossSum(loss, len(batch.targets.tokens))}

    def predict(self, model: nn.Module, batch: Batch) -> list[Prediction]:
        """Return the greedy answer of each left-padded row."""
        return list(self.answer(model, batch))

    def constant(self, examples: Sequence[Example]) -> Text:
        """Return the most frequent answer of these rows."""
        return Text(text=self.most_common_answer(examples))

    @torch.inference_mode()
    def answer(
        self,
        model: nn.Module,
        batch: Batch,
        *,
        max_new_tokens: Sequence[int] | None = None,
        on_text: OnText | None = None,
        is_stopped: IsStopped | None = None,
    ) -> list[Answer]:
        """Returns the greedy answer of each left-padded row, with how it came about.

        Args:
            model: in eval mode, on the batch's device.
            batch: rows that end where their answers begin.
            max_new_tokens: of each row; the task's for all by default.
            on_text: told of each row's text as it grows, as ``generate_answers`` has it.
            is_stopped: asked whether a row is to end early, as ``generate_answers`` has it.
        """
        limits = max_new_tokens or [self.options.longest_answer] * len(batch.examples)
        return generate_answers(
            model, self.tokenizer, batch, max_new_tokens=limits, on_text=on_text, is_stopped=is_stopped
        )
