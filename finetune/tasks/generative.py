"""The base class of tasks whose base generates text: logits for training, and greedy answers."""

from __future__ import annotations

from typing import TYPE_CHECKING

from finetune.core.prediction import Text
from finetune.tasks.answers import AnswerTask

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from torch import Tensor, nn
    from transformers import PreTrainedModel, PreTrainedTokenizerBase, ProcessorMixin

    from finetune.core.batch import Batch
    from finetune.core.example import Example
    from finetune.core.prediction import Prediction
    from finetune.interfaces import ModelFamily, Prompts, TaskCollator
    from finetune.recipe import PromptSection, ReadSection
    from finetune.tasks.generation import Answer, IsStopped, OnText


class GenerativeTask(AnswerTask):
    """A task with one greedy prediction for each row. Importing this module loads no torch.

    Args:
        options: the section of the task, from the recipe or the adapter.
        tokenizer: the tokenizer of the base.
    """

    options: PromptSection

    def __init__(self, options: PromptSection, tokenizer: PreTrainedTokenizerBase):
        self.options, self.tokenizer = options, tokenizer

    @staticmethod
    def collator(
        family: ModelFamily, model: PreTrainedModel, processor: ProcessorMixin, data: ReadSection | None
    ) -> TaskCollator:
        """Return the collator that renders conversations and labels their supervised turns."""
        from finetune.data.collate import Collator

        return Collator.of_base(family, model, processor, data)

    def outputs(self, model: nn.Module, batch: Batch) -> Tensor:
        """Return the logits [N, V] that predict the supervised tokens."""
        from finetune.tasks.supervised_logits import logits_at

        assert batch.targets is not None
        return logits_at(model, batch.inputs, batch.targets.predictors)

    def predict(self, model: nn.Module, batch: Batch) -> list[Prediction]:
        """Return the prediction of each left-padded row."""
        return [self.prediction(answer) for answer in self.answer(model, batch)]

    def prediction(self, answer: Answer) -> Prediction:
        """Return the prediction that an answer is."""
        return answer

    def limits(self, examples: Sequence[Example]) -> list[int]:
        """Return the largest number of new tokens of each row."""
        return [self.options.longest_answer] * len(examples)

    def why_fixed_batches(self, model: PreTrainedModel) -> str | None:
        """Return why ``predict_rows`` cannot be used, for the user; None if nothing is known."""
        from finetune.tasks.continuous_support import why_fixed_batches

        own = type(self)
        if own.predict is not GenerativeTask.predict or own.answer is not GenerativeTask.answer:
            return f"{own.__name__} predicts batches in its own way"
        return why_fixed_batches(model)

    def predict_rows(
        self,
        model: PreTrainedModel,
        prompts: Prompts,
        examples: Sequence[Example],
        *,
        order: Sequence[int],
        share: tuple[int, int],
        batch_size: int,
        on_prediction: Callable[[int, Prediction], object],
    ) -> str | None:
        """Predict rows in a continuous batch: a row leaves it at its end, and the next one takes its place.

        Args:
            model: the model in eval mode, on its device.
            prompts: the inputs of rows without their answers.
            examples: all rows.
            order: the numbers of the rows, in the order in which they are predicted.
            share: the index of this process, and the number of processes that share the rows.
            batch_size: the largest number of rows at the same time.
            on_prediction: the function that gets the number of each row and its prediction.

        Returns:
            Why no row was predicted, because this model needs fixed batches; None if the share of this process was.
        """
        import torch

        from finetune.tasks.continuous_batching import ContinuousBatch, grouped
        from finetune.tasks.continuous_support import processors_of, why_not_the_same

        process, processes = share
        every = grouped(order, examples, prompts)
        groups = every[process::processes]
        rows = [row for group in groups for row in group.rows]
        limits = dict(zip(rows, self.limits([examples[row] for row in rows]), strict=True))
        batch = ContinuousBatch(model, self.tokenizer, prompts, processors_of(model), batch_size=batch_size)
        with torch.inference_mode():
            # A process without rows must come to the same verdict as the others.
            if every and (why := why_not_the_same(batch, groups or every, examples)):
                return why
            batch.answers(groups, examples, limits, lambda row, answer: on_prediction(row, self.prediction(answer)))
        return None

    def constant(self, examples: Sequence[Example]) -> Prediction:
        """Return the most frequent answer of these rows."""
        return Text(text=self.most_common_answer(examples))

    def answer(
        self,
        model: nn.Module,
        batch: Batch,
        *,
        max_new_tokens: Sequence[int] | None = None,
        on_text: OnText | None = None,
        is_stopped: IsStopped | None = None,
    ) -> list[Answer]:
        """Return the greedy answer of each left-padded row, with its token counts and finish reason.

        Args:
            model: the model in eval mode, on the batch's device.
            batch: the batch of rows, each of which ends before its answer.
            max_new_tokens: the largest number of new tokens of each row; the task's for all by default.
            on_text: the function that gets each new piece of a row's text, as in ``generate_answers``.
            is_stopped: the function that returns whether a row must end early, as in ``generate_answers``.
        """
        import torch

        from finetune.tasks.generation import generate_answers

        limits = max_new_tokens or self.limits(batch.examples)
        with torch.inference_mode():
            return generate_answers(
                model, self.tokenizer, batch, max_new_tokens=limits, on_text=on_text, is_stopped=is_stopped
            )
