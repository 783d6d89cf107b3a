"""What is learnt and how it is judged."""

from typing import Annotated, Any, ClassVar, Literal

from pydantic import BeforeValidator, Field, field_validator

from finetune.example import ImagePosition, Message, answer, ask, show, system, text_of
from finetune.fields import NumTokens, Word
from finetune.lookup import look_up
from finetune.metrics.normalization import DecimalSeparator, Normalization, Normalizer, normalizer
from finetune.recipe.section import Prompt, Section
from finetune.tables import METRICS

DEFAULT_ANSWER_TOKENS = 128  # of an answer at most, where neither a recipe nor its data says more


class AnswerSection(Section):
    """How answers are compared, for every task whose predictions are answers."""

    answer_normalization: Normalization = "exact"
    """Which differences do not count. exact: case and white space around; vqa: the VQA script's; number: the value."""
    decimal_separator: DecimalSeparator = "."
    """The mark before the fraction of a number, for answer_normalization number; the other one may group digits."""
    metrics: Annotated[list[Word], Field(min_length=1)] | None = Field(default=None, exclude_if=lambda it: it is None)
    """Metrics that an evaluation reports; the first chooses the best checkpoint. By default the task's own."""

    @field_validator("metrics")
    @classmethod
    def _are_known(cls, names: list[str] | None) -> list[str] | None:
        for i, name in enumerate(names or ()):
            look_up(METRICS, name, what="metric")
            if name in (names or ())[:i]:
                raise ValueError(f"the metric {name!r} stands twice")
        return names

    @property
    def normalize(self) -> Normalizer:
        """The function that brings answers into the form in which they are compared."""
        return normalizer(self.answer_normalization, decimal_separator=self.decimal_separator)


class VqaSection(AnswerSection):
    """How questions are put and answers judged. The adapter carries this, and ``.ask`` repeats it exactly."""

    has_question: ClassVar[bool] = True  # whether a row must have one

    name: Literal["vqa"] = "vqa"
    """The task."""
    system_prompt: Prompt | None = None
    """Stands before every question; by default that of the rows, where all have the same. An empty text: none."""
    question_template: Prompt = "{question}"
    """What is asked; ``{question}`` stands once in it, for that of the row. Conversations are left as they are."""
    image_position: ImagePosition | None = None
    """Whether images stand before or after the text of a question; by default as in the conversations, else first."""
    max_new_tokens: NumTokens | None = None
    """Longest answer, in tokens; by default the longest supervised answer of the data, and some room."""

    @field_validator("question_template")
    @classmethod
    def _has_its_place(cls, template: str) -> str:
        if template.count("{question}") != 1:
            raise ValueError("question_template must hold {question} exactly once")
        return template

    @property
    def longest_answer(self) -> int:
        """The most tokens of an answer."""
        return self.max_new_tokens or DEFAULT_ANSWER_TOKENS

    def ask(self, question: str, *, num_images: int = 1) -> list[Message]:
        """Return the messages that put ``question``, with its images."""
        text = self.question_template.replace("{question}", question)
        return ask(
            text,
            num_images=num_images,
            system_prompt=self.system_prompt,
            image_position=self.image_position or "first",
        )

    def converse(self, messages: list[Message]) -> list[Message]:
        """Returns a conversation as it stands, with the system prompt first where it has none of its own."""
        if not self.system_prompt or messages[0]["role"] == "system":
            return messages
        return [system(self.system_prompt), *messages]

    def text_of(self, label: str) -> str:
        """Returns the text that is learnt for an answer: the answer itself."""
        return label


class ContrastiveSection(AnswerSection):
    """How pictures and texts are brought together. The adapter carries this, and ``.classify`` repeats it exactly."""

    has_question: ClassVar[bool] = False

    name: Literal["contrastive"]
    """The task."""
    text_template: Prompt = "{label}"
    """The text that stands for an answer, such as ``a photo of {label}``; ``{label}`` stands once in it."""

    @field_validator("text_template")
    @classmethod
    def _has_its_place(cls, template: str) -> str:
        if template.count("{label}") != 1:
            raise ValueError("text_template must hold {label} exactly once")
        return template

    def ask(self, question: str, *, num_images: int = 1) -> list[Message]:
        """Returns the message that shows the pictures; a dual encoder is put no question."""
        return show(num_images=num_images)

    def converse(self, messages: list[Message]) -> list[Message]:
        """Returns a conversation whose last turn holds the text of what was answered."""
        return [*messages[:-1], answer(self.text_of(text_of(messages[-1])))]

    def text_of(self, label: str) -> str:
        """Returns the text that stands for ``label``."""
        return self.text_template.replace("{label}", label)


TaskSection = VqaSection | ContrastiveSection


def _vqa_by_default(value: Any) -> Any:
    return {"name": "vqa", **value} if isinstance(value, dict) else value


AnyTask = Annotated[
    Annotated[TaskSection, Field(discriminator="name")],
    BeforeValidator(_vqa_by_default),
]
