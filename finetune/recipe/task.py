"""Sections of the recipe for tasks: the base class, and those for questions, generated text and labels.

The file of a task defines the task's own section as ``Config``. One class serves the recipe and the manifest.
"""

from collections import defaultdict
from collections.abc import Collection
from contextlib import suppress
from dataclasses import replace
from typing import Annotated, ClassVar, Self

from pydantic import Field, SerializeAsAny, ValidationError, field_validator

from finetune.core.example import Example, ImagePosition, Message, answer, ask, show, system, text_of
from finetune.core.fields import NumTokens, Word
from finetune.errors import ModelError, brief
from finetune.metrics.normalization import DecimalSeparator, Normalization, Normalizer, normalizer
from finetune.plugins import config_of, names
from finetune.recipe.chosen import Choice
from finetune.recipe.method import MethodSection
from finetune.recipe.row import Row
from finetune.recipe.section import Prompt, Section
from finetune.tables import ANSWER_METRICS, DEFAULT_TASK

DEFAULT_ANSWER_TOKENS = 128  # the limit of an answer if neither the recipe nor its data sets one
# The question that asks for a caption where neither the recipe nor its rows have one.
CAPTION_QUESTION = "Describe the picture."


class TaskSection(Section):
    """A task and its settings; the base of every task's own section. An adapter's manifest keeps it."""

    architectures: ClassVar[frozenset[str]]  # the architectures of the bases that the task supports
    has_question: ClassVar[bool]  # True if each row must have a question
    outputs: ClassVar[str]  # the outputs from which objectives are computed
    objective: ClassVar[str]  # the objective of a recipe that names none
    call: ClassVar[str] = "predict(image, question)"  # the call with which an app asks for a prediction
    columns: ClassVar[tuple[str, ...]] = ()  # the columns that only this task reads from rows

    name: str
    """The name of the task."""
    metrics: Annotated[list[Word], Field(min_length=1)] | None = Field(
        default=None, exclude_if=lambda it: it is None, examples=[[*ANSWER_METRICS]]
    )
    """Metrics that an evaluation reports; the first chooses the best checkpoint. By default those of the task."""

    @field_validator("metrics")
    @classmethod
    def _each_once(cls, named: list[str] | None) -> list[str] | None:
        if twice := next((name for name in named or () if (named or []).count(name) > 1), None):
            raise ValueError(f"a metric must be unique, but {twice!r} is given twice. Remove one of them")
        return named

    @property
    def is_complete(self) -> bool:
        """False if ``from_rows`` must add settings before a row can be predicted."""
        return True

    def from_rows(self, *, answers: Collection[str] | None, question: str | None) -> Self:
        """Return the section with the settings that the train rows decide; most tasks have none.

        Args:
            answers: the different answers of the rows; None if the rows are a stream, which is not read ahead.
            question: the question of most rows; None if no row has one.

        Raises:
            DataError: the rows do not decide a setting.
        """
        return self

    @property
    def own_question(self) -> str | None:
        """The question of rows that have none, if the data section names none; None if each row must have one."""
        return None

    def ask(self, question: str, *, num_images: int = 1) -> list[Message]:
        """Return the messages that show the images and ask ``question``, if there is one."""
        return ask(question, num_images=num_images) if question else show(num_images=num_images)

    def converse(self, messages: list[Message]) -> list[Message]:
        """Return a conversation as the model reads it: unchanged."""
        return messages

    def text_of(self, label: str) -> str:
        """Return the text that is supervised for an answer: the answer itself."""
        return label

    @property
    def parts(self) -> list[MethodSection]:
        """The methods that the task trains beside the recipe's, such as a head; saved and swapped like them."""
        return []

    @property
    def answer_room(self) -> int:
        """The number of tokens that an evaluated row must leave free for its answer."""
        return 0

    def to_example(self, row: Row) -> Example:
        """Return the example of a row of data; a task whose rows have fields of their own reads them here.

        Raises:
            RowError: the row cannot be used.
        """
        return row.conversation(self) if row.supervised_field == "messages" else row.question_and_answer(self)

    def to_evaluate(self, examples: list[Example]) -> list[Example]:
        """Return the examples of a split as they are evaluated; a second call changes nothing more."""
        return examples

    def as_trained(self, *, caption_question: str | None = None) -> Self:
        """Return the section for a manifest, with no setting left to a default of the code.

        Args:
            caption_question: the question that most rows with captions ask; None if no row has captions.
        """
        return self


class AnswerSection(TaskSection):
    """The rules by which answers are compared, for every task whose predictions are answers."""

    answer_normalization: Normalization = "exact"
    """Differences that do not count. exact: case and outer white space; vqa: as the VQA script; number: notation."""
    decimal_separator: DecimalSeparator = "."
    """The mark before the fraction of a number, for answer_normalization number; the other one may group digits."""

    @property
    def normalize(self) -> Normalizer:
        """The function that returns an answer in the form in which answers are compared."""
        return normalizer(self.answer_normalization, decimal_separator=self.decimal_separator)

    @property
    def allowed_answers(self) -> list[str] | None:
        """The only answers that rows and predictions may have; None for any answer."""
        return None


class QuestionSection(AnswerSection):
    """The prompt of a generative base, for every task whose rows have a question. An app repeats it exactly."""

    architectures = frozenset({"generative"})
    has_question = True

    system_prompt: Prompt | None = Field(default=None, examples=["You read brain MRI."])
    """The system message of every question; by default that of the rows, if all have the same. An empty text: none."""
    question_template: Prompt = Field(default="{question}", examples=["Question: {question} Answer:"])
    """The text of the prompt, with ``{question}`` once for the row's question. Conversations are not changed."""
    image_position: ImagePosition | None = None
    """Place of the images, before or after the question's text; by default as in the conversations, else first."""

    @field_validator("question_template")
    @classmethod
    def _has_its_place(cls, template: str) -> str:
        return _once("question_template", "{question}", template)

    def ask(self, question: str, *, num_images: int = 1) -> list[Message]:
        """Return the messages that ask ``question``, with its images."""
        text = self.question_template.replace("{question}", question)
        return ask(
            text,
            num_images=num_images,
            system_prompt=self.system_prompt,
            image_position=self.image_position or "first",
        )

    def converse(self, messages: list[Message]) -> list[Message]:
        """Return a conversation unchanged, with the system prompt first if it has no system message."""
        if not self.system_prompt or messages[0]["role"] == "system":
            return messages
        return [system(self.system_prompt), *messages]

    def text_of(self, label: str) -> str:
        """Return the text that is supervised for an answer: the answer itself."""
        return label

    def as_trained(self, *, caption_question: str | None = None) -> Self:
        """Return the section with its defaults written out."""
        update = {"system_prompt": self.system_prompt or None, "image_position": self.image_position or "first"}
        return self.model_copy(update=update)


class PromptSection(QuestionSection):
    """The prompt of a base that answers by generated text. ``ask`` repeats it exactly."""

    outputs = "token_logits"
    objective = "cross_entropy"
    call = "ask(image, question)"

    max_new_tokens: NumTokens | None = Field(default=None, examples=[16])
    """Largest number of tokens of an answer; by default the longest supervised answer of the data, and some room."""
    caption_question: Prompt | None = Field(
        default=None, exclude_if=lambda it: it is None, examples=["Describe the image."]
    )
    """The question that ``caption`` asks; by default the one that most rows with captions ask."""

    @property
    def longest_answer(self) -> int:
        """The largest number of tokens of an answer."""
        return self.max_new_tokens or DEFAULT_ANSWER_TOKENS

    @property
    def answer_room(self) -> int:
        """The number of tokens of the longest answer; 0 if it is unknown."""
        return self.max_new_tokens or 0

    def as_trained(self, *, caption_question: str | None = None) -> Self:
        """Return the section with its defaults written out."""
        update = {
            "max_new_tokens": self.longest_answer,
            "caption_question": self.caption_question or caption_question,
        }
        return super().as_trained().model_copy(update=update)


class LabelSection(AnswerSection):
    """The texts of the labels that a dual encoder chooses among. ``classify`` repeats it exactly."""

    architectures = frozenset({"dual_encoder"})
    has_question = False
    outputs = "pair_embeddings"
    call = "classify(image, labels)"

    text_template: Prompt = Field(default="{label}", examples=["a photo of {label}"])
    """The text of an answer, such as ``a photo of {label}``; it holds ``{label}`` exactly once."""

    @field_validator("text_template")
    @classmethod
    def _has_its_place(cls, template: str) -> str:
        return _once("text_template", "{label}", template)

    def ask(self, question: str, *, num_images: int = 1) -> list[Message]:
        """Return the message that shows the images; a dual encoder reads no question."""
        return show(num_images=num_images)

    def converse(self, messages: list[Message]) -> list[Message]:
        """Return a conversation whose last turn holds the text of its answer."""
        return [*messages[:-1], answer(self.text_of(text_of(messages[-1])))]

    def text_of(self, label: str) -> str:
        """Return the text of ``label``."""
        return self.text_template.replace("{label}", label)

    def to_evaluate(self, examples: list[Example]) -> list[Example]:
        """Return the examples, each with the labels of its question type as choices."""
        choices: dict[str, dict[str, str]] = defaultdict(dict)
        for example in examples:
            choices[example.question_type] |= {label: self.text_of(label) for label in example.answers}
        return [replace(example, choices=choices[example.question_type]) for example in examples]


AnyTask = Annotated[SerializeAsAny[TaskSection], Choice("tasks", default=DEFAULT_TASK)]


def task_of(architecture: str | None = None) -> TaskSection:
    """Return the settings of the default task of an architecture.

    Args:
        architecture: the architecture of the base; None for the task of a recipe that names none.

    Raises:
        ModelError: no task supports such a base, or every such task has a required setting.
    """
    if architecture is None:
        return config_of("tasks", DEFAULT_TASK, what="task")(name=DEFAULT_TASK)
    for name in (supporting := tasks_for(architecture)):
        with suppress(ValidationError):  # the task has a required setting, which only a recipe has
            return config_of("tasks", name, what="task")(name=name)
    raise ModelError(
        f"no default task for a base of the architecture {architecture!r}: {', '.join(supporting)} must have settings, "
        "got none. Load an adapter: its manifest has them."
    )


def tasks_for(architecture: str) -> list[str]:
    """Return the names of the tasks that support bases of an architecture, the default task first.

    Raises:
        ModelError: no task supports such a base.
    """
    known = [DEFAULT_TASK, *(name for name in names("tasks") if name != DEFAULT_TASK)]
    found = [name for name in known if architecture in config_of("tasks", name, what="task").architectures]
    if not found:
        raise ModelError(
            f"no task supports a base of the architecture {architecture!r}. Known tasks: {', '.join(known)}. Use "
            "another base, or install a package with a task for it."
        )
    return found


def _once(key: str, mark: str, template: str) -> str:
    if template.count(mark) != 1:
        raise ValueError(f"{key} must hold {mark} exactly once, got {brief(template)}")
    return template
