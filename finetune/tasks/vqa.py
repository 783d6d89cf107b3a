"""Visual question answering: next-token loss on the answer, judged by exact match after normalisation."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from finetune.interfaces import LossSum
from finetune.tasks.exact_match import ExactMatch
from finetune.tasks.head import logits_at

if TYPE_CHECKING:
    from torch import nn
    from transformers import PreTrainedTokenizerBase

    from finetune.batch import Batch
    from finetune.recipe import VqaSection


class VqaTask(ExactMatch):
    """One term, ``answer``; one prediction a row, decoded greedily."""

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

    @torch.inference_mode()
    def predict(self, model: nn.Module, batch: Batch) -> list[str]:
        """Returns the greedy answer of each left-padded row."""
        width = batch.inputs["input_ids"].shape[1]
        out = model.generate(  # type: ignore[operator]
            **batch.inputs, max_new_tokens=self.options.max_new_tokens, do_sample=False, num_beams=1
        )
        answers = self.tokenizer.batch_decode(out[:, width:], skip_special_tokens=True)
        return [answer.strip() for answer in answers]
