"""A survey of the rows of a split: the shapes of their prompts, their answers, and the lengths of the answers.

A survey takes one row at a time, so that it can cover rows that are not kept.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal

from finetune.core.example import text_of

if TYPE_CHECKING:
    from collections.abc import Iterable

    from finetune.core.example import Example, ImagePosition, Message

Form = Literal["question", "caption", "conversation"]


@dataclass(frozen=True)
class PromptShape:
    """The parts of a row's prompt that may differ between training and use.

    Attributes:
        form: the form of the row: a question with its answer, an image with its captions, or a conversation.
        system: the text of the system message; None where there is none.
        turns: the role and the part types of each message before the answer, without the system message.
    """

    form: Form
    system: str | None
    turns: tuple[tuple[str, tuple[str, ...]], ...]

    @classmethod
    def of(cls, example: Example) -> PromptShape:
        """Return the shape of a row's prompt."""
        turns = [message for message in example.prompt if message["role"] != "system"]
        return cls(
            form_of(example),
            system_of(example),
            tuple((turn["role"], tuple(part["type"] for part in turn["content"])) for turn in turns),
        )

    def __str__(self) -> str:
        turns = "; ".join(f"{role}: {', '.join(parts)}" for role, parts in self.turns)
        return f"{self.form} ({'system message; ' if self.system is not None else ''}{turns})"


@dataclass
class Survey:
    """The facts about the rows of one split.

    Attributes:
        num_rows: the number of rows that were added.
        shapes: each shape of a prompt -> the first row that has it.
        systems: each text of a system message, or None -> the number of rows with it.
        image_positions: each position of the images in a conversation's first question -> the number of rows with it;
            None for images between texts.
        answers: each reference answer -> the id of the first row that has it.
        questions: each question -> the number of rows with it.
        answer_tokens: each length of a row's longest supervised answer in tokens -> the number of rows with it.
        longest_row: the largest number of tokens of a row; None if no row was counted.
        is_whole: whether these are all rows of the split; False for the first rows of a stream.
    """

    num_rows: int = 0
    shapes: dict[PromptShape, Example] = field(default_factory=dict)
    systems: Counter[str | None] = field(default_factory=Counter)
    image_positions: Counter[ImagePosition | None] = field(default_factory=Counter)
    answers: dict[str, str] = field(default_factory=dict)
    questions: Counter[str] = field(default_factory=Counter)
    answer_tokens: Counter[int] = field(default_factory=Counter)
    longest_row: int | None = None
    is_whole: bool = True

    @classmethod
    def of(cls, examples: Iterable[Example]) -> Survey:
        """Return the survey of some rows."""
        survey = cls()
        for example in examples:
            survey.add(example)
        return survey

    def add(self, example: Example) -> None:
        """Add one row."""
        self.num_rows += 1
        self.shapes.setdefault(PromptShape.of(example), example)
        self.systems[system_of(example)] += 1
        if form_of(example) == "conversation":
            first = next(message for message in example.messages if message["role"] == "user")
            if any(part["type"] == "image" for part in first["content"]):
                self.image_positions[position_of(first)] += 1
        for answer in example.answers:
            self.answers.setdefault(answer, example.id)
        if question := example.meta.get("question"):
            self.questions[str(question)] += 1
        if example.num_answer_tokens is not None:
            self.answer_tokens[example.num_answer_tokens] += 1
        if example.num_tokens is not None:
            self.longest_row = max(self.longest_row or 0, example.num_tokens)

    @property
    def longest_answer(self) -> int | None:
        """Return the number of tokens of the longest answer; None if no answer was counted."""
        return max(self.answer_tokens, default=None)

    @property
    def forms(self) -> set[Form]:
        """Return the forms of all rows."""
        return {shape.form for shape in self.shapes}


def form_of(example: Example) -> Form:
    """Return the form in which a row was written."""
    if example.meta.get("conversation"):
        return "conversation"
    return "caption" if example.captions else "question"


def system_of(example: Example) -> str | None:
    """Return the text of a row's system message; None if it has none."""
    first = example.messages[0]
    return text_of(first) if first["role"] == "system" else None


def position_of(message: Message) -> ImagePosition | None:
    """Return the position of a message's images, before or after its text; None if they are between texts."""
    types = [part["type"] for part in message["content"]]
    images = types.count("image")
    if types[:images] == ["image"] * images:
        return "first"
    return "last" if types[-images:] == ["image"] * images else None
