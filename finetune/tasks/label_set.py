"""The section of tasks with a closed set of labels, taken from the train rows if the recipe names none."""

from collections.abc import Collection, Sequence
from dataclasses import replace
from typing import Annotated, Any, Self

from pydantic import Field, model_validator

from finetune.core.example import Example
from finetune.errors import DataError, brief
from finetune.lookup import did_you_mean
from finetune.metrics.normalization import equal_answers
from finetune.recipe import PromptSection
from finetune.recipe.row import Row
from finetune.recipe.section import Fraction, Prompt

QUESTION = "What does the image show?"  # of rows without a question, if nothing else gives one


class LabelSetSection(PromptSection):
    """The labels of a task that chooses among them by their likelihood."""

    call = "classify(image)"

    labels: Annotated[list[Annotated[Prompt, Field(min_length=1)]], Field(min_length=2)] | None = Field(
        default=None, examples=[["cat", "dog"]]
    )
    """The labels that a prediction chooses from; by default all answers of the train rows."""
    length_normalized: bool = False
    """True to divide the log-likelihood of a label by its number of tokens, so that long labels lose nothing."""
    question: Prompt | None = Field(default=None, examples=["What does the image show?"])
    """Question of rows without one, and of ``classify(image)``; by default the most frequent one of the train rows."""
    positive_label: Prompt | None = Field(default=None, exclude_if=lambda it: it is None, examples=["dog"])
    """The label whose rows must be found, for the metric recall_at_fpr."""
    false_positive_rate: Fraction = Field(default=0.05, exclude_if=lambda it: it == 0.05, examples=[0.01])
    """Largest share of the other rows that may count as the positive label, for the metric recall_at_fpr."""

    @model_validator(mode="after")
    def _labels_differ(self) -> Self:
        for label in self.labels or ():
            if not label.strip() or label != label.strip():
                raise ValueError(f"a label must be a text without white space around it, got {brief(label)}")
        if equal := equal_answers(self.labels or (), normalize=self.normalize):
            raise ValueError(f"labels {_equal(equal[0], self)}. Remove all but one of them")
        if len(set(self.labels or ())) < len(self.labels or ()):
            twice = next(label for label in self.labels or () if (self.labels or []).count(label) > 1)
            raise ValueError(f"a label must be unique, but {twice!r} is given twice. Remove one of them")
        if self.positive_label is not None and self.labels is not None and self.positive_label not in self.labels:
            hint = did_you_mean(self.positive_label, self.labels)
            raise ValueError(f"positive_label must be one of the labels, got {brief(self.positive_label)}.{hint}")
        if self.positive_label is None and "recall_at_fpr" in (self.metrics or ()):
            raise ValueError("positive_label must be set for the metric recall_at_fpr, got none")
        return self

    @property
    def is_complete(self) -> bool:
        """False while the labels are not known."""
        return self.labels is not None

    @property
    def allowed_answers(self) -> list[str] | None:
        """The labels; None while they are not known."""
        return self.labels

    @property
    def own_question(self) -> str:
        """The question of rows that have none, and of ``classify(image)``."""
        return self.question or QUESTION

    def from_rows(self, *, answers: Collection[str] | None, question: str | None) -> Self:
        """Return the section with the labels and the question of the train rows, where the recipe leaves them open.

        Raises:
            DataError: the rows have no labels that could be told apart, or are a stream.
        """
        update: dict[str, Any] = {} if self.question is not None else {"question": question or QUESTION}
        if self.labels is not None:
            return self.model_copy(update=update)
        if answers is None:
            raise DataError(
                "task.labels must list the labels if the train rows are a stream, which is not read ahead, got none. "
                "Set task.labels."
            )
        if len(answers) < 2:
            raise DataError(
                f"the train rows must have at least two labels, got {brief([*answers])}. Set task.labels to all labels."
            )
        if equal := equal_answers(answers, normalize=self.normalize):
            raise DataError(
                f"the answers of the train rows must be labels that can be told apart, but {_equal(equal[0], self)}. "
                "Write each label in one way, or set task.labels."
            )
        if self.positive_label is not None and self.positive_label not in answers:
            raise DataError(
                f"task.positive_label must be one of the labels of the train rows, got {brief(self.positive_label)}."
                f"{did_you_mean(self.positive_label, answers)} Correct it."
            )
        return self.model_copy(update=update | {"labels": sorted(answers)})

    def to_example(self, row: Row) -> Example:
        """Return the example of a row; its answer is written as the label that it equals.

        Raises:
            RowError: the row has not one label of the task.
        """
        example, key = super().to_example(row), row.supervised_field
        if key == "captions":
            raise row.fault(
                key,
                "must be absent, because a row of this task has one label. Set data.captions=null",
                reason="captions",
            )
        written = list(dict.fromkeys(map(self.normalize, example.answers)))
        if len(written) > 1:
            raise row.fault(key, f"must be one label, got {brief(example.answers)}", reason="several labels")
        if self.labels is None:
            return example
        label = next((label for label in self.labels if self.normalize(label) == written[0]), None)
        if label is None:
            found = example.answers[0]
            hint = did_you_mean(found, self.labels)
            raise row.fault(
                key, f"must be one of {brief(self.labels, 200)}, got {brief(found, 80)}.{hint}", reason="no label"
            )
        return replace(example.with_text(label), answers=[label])

    def as_trained(self, *, caption_question: str | None = None) -> Self:
        """Return the section with its defaults written out."""
        return super().as_trained().model_copy(update={"question": self.own_question})


def _equal(labels: Sequence[str], options: LabelSetSection) -> str:
    named = " and ".join(brief(label, 40) for label in labels[:4])
    return f"{named} count as equal (task.answer_normalization: {options.answer_normalization})"
