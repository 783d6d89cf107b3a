"""How questions are put and answers judged."""

from typing import Literal

from pydantic import model_validator

from finetune.example import Message, ask, system
from finetune.recipe.section import PositiveInt, Section


class TaskSection(Section):
    """How questions are put and answers judged. The adapter carries this, and ``.ask`` repeats it exactly."""

    name: Literal["vqa"] = "vqa"
    """The task."""
    system_prompt: str | None = None
    """Stands before every question."""
    question_template: str = "{question}"
    """What is asked; ``{question}`` stands once in it, for that of the row."""
    max_new_tokens: PositiveInt = 16
    """Longest answer, in tokens."""
    answer_normalization: Literal["vqa"] = "vqa"
    """What is made equal before answers are compared."""

    @model_validator(mode="after")
    def _has_its_place(self) -> "TaskSection":
        if self.question_template.count("{question}") != 1:
            raise ValueError("question_template must hold {question} exactly once")
        return self

    def ask(self, question: str, *, num_images: int = 1) -> list[Message]:
        """Returns the messages that put ``question``, with its pictures before it."""
        text = self.question_template.replace("{question}", question)
        return ask(text, num_images=num_images, system_prompt=self.system_prompt)

    def converse(self, messages: list[Message]) -> list[Message]:
        """Returns a conversation as it stands, with the system prompt first where it has none of its own."""
        if not self.system_prompt or messages[0]["role"] == "system":
            return messages
        return [system(self.system_prompt), *messages]
