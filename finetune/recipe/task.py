"""What is learnt and how it is judged."""

from typing import Annotated, Any, ClassVar, Literal

from pydantic import BeforeValidator, Field, field_validator

from finetune.example import Message, answer, ask, show
from finetune.recipe.section import PositiveInt, Section


class VqaSection(Section):
    """How questions are put and answers judged. The adapter carries this, and ``.ask`` repeats it exactly."""

    has_question: ClassVar[bool] = True  # whether a row must have one

    name: Literal["vqa"] = "vqa"
    system_prompt: str | None = None
    question_template: str = "{question}"
    max_new_tokens: PositiveInt = 16
    answer_normalization: Literal["vqa"] = "vqa"

    @field_validator("question_template")
    @classmethod
    def _has_its_place(cls, template: str) -> str:
        if template.count("{question}") != 1:
            raise ValueError("question_template must hold {question} exactly once")
        return template

    def ask(self, question: str) -> list[Message]:
        """Returns the messages that put ``question``, with one picture before it."""
        return ask(self.question_template.replace("{question}", question), system_prompt=self.system_prompt)

    def say(self, text: str) -> Message:
        """Returns the turn that answers with ``text``."""
        return answer(text)


class ContrastiveSection(Section):
    """How pictures and texts are brought together. The adapter carries this, and ``.classify`` repeats it exactly."""

    has_question: ClassVar[bool] = False

    name: Literal["contrastive"]
    text_template: str = "{label}"  # the text of a label, such as "a photo of a {label}"
    answer_normalization: Literal["vqa"] = "vqa"

    @field_validator("text_template")
    @classmethod
    def _has_its_place(cls, template: str) -> str:
        if template.count("{label}") != 1:
            raise ValueError("text_template must hold {label} exactly once")
        return template

    def ask(self, question: str) -> list[Message]:
        """Returns the message that shows one picture; a dual encoder is put no question."""
        return show()

    def say(self, text: str) -> Message:
        """Returns the turn that holds the text of the label ``text``."""
        return answer(self.text_of(text))

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
