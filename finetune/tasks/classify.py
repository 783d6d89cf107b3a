"""Classification by a base that generates text: the answer is the label whose text is most likely after the prompt."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal

from finetune.core.example import Example, Image, answer
from finetune.core.prediction import Label
from finetune.errors import DataError
from finetune.tables import LABEL_METRICS
from finetune.tasks.generative import GenerativeTask
from finetune.tasks.label_set import LabelSetSection

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from torch import Tensor, nn
    from transformers import PreTrainedModel

    from finetune.core.batch import Batch
    from finetune.core.prediction import Prediction
    from finetune.interfaces import Prompts, TaskCollator
    from finetune.tasks.generation import Answer, IsStopped, OnText


class ClassifyConfig(LabelSetSection):
    """The section of the classification task. The adapter keeps it, and ``.classify`` uses it unchanged."""

    name: Literal["classify"]
    """The name of the task."""


class ClassifyTask(GenerativeTask):
    """The classification task: it trains on the label's text, and predicts by the likelihood of all labels."""

    Config = ClassifyConfig
    metrics = LABEL_METRICS
    options: ClassifyConfig
    _ids: list[list[int]]  # of each label

    def prepare(self, collator: TaskCollator) -> None:
        """Find the tokens of each label, as training rows have them, with the one that ends the answer.

        Raises:
            DataError: two labels have the same tokens.
        """
        self._collator: Any = collator
        self._ids = [self._tokens(label) for label in self.options.labels or ()]
        known: dict[tuple[int, ...], str] = {}
        for label, ids in zip(self.options.labels or (), self._ids, strict=True):
            if (other := known.setdefault(tuple(ids), label)) != label:
                raise DataError(
                    f"each label must have tokens of its own, but the tokenizer of this base gives {other!r} and "
                    f"{label!r} the same. Rename one of them in the rows and in task.labels."
                )

    def _tokens(self, label: str) -> list[int]:
        messages = [*self.options.ask(self.options.own_question), answer(label)]
        row = Example(id=f"of the label {label!r}", messages=messages, media=(Image(b""),), answers=[label])
        found = self._collator.supervise(row)
        first, stop = found.supervised[-1]
        ids: list[int] = found.ids[first:stop]
        return ids

    def predict(self, model: nn.Module, batch: Batch) -> list[Prediction]:
        """Return the most likely label of each left-padded row, with the scores of all labels."""
        import torch

        from finetune.tasks.likelihood import log_likelihoods

        with torch.inference_mode():
            return self._labels(log_likelihoods(model, batch, self._ids, mark=self._mark))

    def answer(
        self,
        model: nn.Module,
        batch: Batch,
        *,
        max_new_tokens: Sequence[int] | None = None,
        on_text: OnText | None = None,
        is_stopped: IsStopped | None = None,
    ) -> list[Answer]:
        """Return the label of each left-padded row as its answer.

        Args:
            model: the model in eval mode, on the batch's device.
            batch: the batch of rows, each of which ends before its answer.
            max_new_tokens: unused, since a label is never cut.
            on_text: the function that gets the label of each row, at once.
            is_stopped: unused, since no row ends before the others.
        """
        from finetune.tasks.generation import Answer

        lengths = batch.inputs["attention_mask"].sum(dim=1).tolist()
        tokens = dict(zip(self.options.labels or (), map(len, self._ids), strict=True))
        answers = []
        for row, (label, length) in enumerate(zip(map(str, self.predict(model, batch)), lengths, strict=True)):
            if on_text is not None:
                on_text(row, label)
            answers.append(Answer(text=label, prompt_tokens=length, completion_tokens=tokens[label]))
        return answers

    def why_fixed_batches(self, model: PreTrainedModel) -> str | None:
        """Return why ``predict_rows`` cannot be used, for the user; None if nothing is known."""
        from finetune.tasks.continuous_support import why_fixed_batches

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
        """Predict rows, where equal prompts about the same images go through the model once, and images once.

        Arguments and result are those of ``GenerativeTask.predict_rows``.
        """
        import torch

        from finetune.tasks.continuous_batching import ContinuousBatch, grouped, images_key
        from finetune.tasks.continuous_support import processors_of, why_not_the_same
        from finetune.tasks.likelihood import after_prompts, why_one_by_one

        equal: dict[Any, list[int]] = {}
        for row in order:
            example = examples[row]
            key = (images_key(example), str(example.prompt), example.image_options)
            equal.setdefault(key, []).append(row)
        rows_of = {rows[0]: rows for rows in equal.values()}
        process, processes = share
        groups = grouped(list(rows_of), examples, prompts)
        if not groups:
            return None
        mine = groups[process::processes]
        tried = mine or groups  # every process must come to the same verdict
        continuous = ContinuousBatch(model, self.tokenizer, prompts, processors_of(model), batch_size=batch_size)
        with torch.inference_mode():
            first = prompts.prompt_batch([examples[tried[0].rows[0]]]).to(model.device, model.dtype)
            why = why_not_the_same(continuous, tried, examples)
            if why := why or why_one_by_one(model, first, self._ids, mark=self._mark):
                return why
            for cached, flying in continuous.prompts_of(mine, examples):
                found = self._labels(after_prompts(model, cached, self._ids))
                for one, prediction in zip(flying, found, strict=True):
                    for row in rows_of[one.row]:
                        on_prediction(row, prediction)
        return None

    def constant(self, examples: Sequence[Example]) -> Prediction:
        """Return the most frequent label of these rows."""
        label = self.most_common_answer(examples)
        return Label(label=label, scores={label: 1.0})

    def _mark(self, inputs: dict[str, Any], labels: Tensor) -> dict[str, Any]:
        marked: dict[str, Any] = self._collator.family.mark_supervised(inputs, labels)
        return marked

    def _labels(self, likelihoods: Tensor) -> list[Prediction]:
        """Return the prediction of each row, from the log-likelihoods [B, labels]."""
        import torch

        labels = self.options.labels or []
        if self.options.length_normalized:
            lengths = torch.tensor([len(ids) for ids in self._ids], device=likelihoods.device)
            likelihoods = likelihoods / lengths
        shares = likelihoods.double().softmax(dim=-1).tolist()
        return [
            Label(label=labels[max(range(len(row)), key=row.__getitem__)], scores=dict(zip(labels, row, strict=True)))
            for row in shares
        ]
