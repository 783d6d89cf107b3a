"""A row of data as an example: its messages, media and answers, independent of its source."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Protocol, TypeAlias, runtime_checkable

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence
    from pathlib import Path

    import numpy as np


@runtime_checkable
class ImageHandle(Protocol):
    """An image that stays where it is until it is opened: small, hashable, picklable, named by ``str``."""

    def read(self) -> Path | bytes:
        """Return the image's file, or the bytes of one."""
        ...

    def key(self) -> str:
        """Return a key that changes whenever the image may have changed."""
        ...

    def files(self) -> Sequence[Path]:
        """Return the files whose state the key holds; none if the key is made of the image's bytes."""
        ...


# Where an image is: a file, the bytes of one, pixels [H, W, 3] uint8, the values [H, W] of an image of more than 8
# bits, or a place inside a larger file.
ImageSource: TypeAlias = "Path | bytes | np.ndarray | ImageHandle"
Message: TypeAlias = dict[str, Any]
ImagePosition = Literal["first", "last"]  # of a question's images: before its text or after it


class Medium(Protocol):
    """A medium that a row shows beside its texts.

    A kind of medium is a frozen dataclass with a ``type`` of its own, which the parts of a message use.
    """

    type: ClassVar[str]


@dataclass(frozen=True)
class Image:
    """One image, where it is until it is opened."""

    type: ClassVar[str] = "image"
    source: ImageSource


def as_images(sources: Iterable[ImageSource]) -> tuple[Image, ...]:
    """Return images as the media of a row."""
    return tuple(Image(source) for source in sources)


@dataclass(frozen=True, kw_only=True)
class ImageOptions:
    """The settings by which the images of a row are opened.

    Attributes:
        range: the values that become black and white in images of more than 8 bits; None for the range of the smallest
            usual bit depth that holds an image's own values.
        page: the number of the TIFF page, from 1; None for a file that must have one page.
    """

    range: tuple[int, int] | None = None
    page: int | None = None


COLUMNS = "columns"  # key of ``meta``: each column that the row's task reads -> its value


@dataclass(frozen=True, kw_only=True)
class Example:
    """One conversation, about some media or none.

    ``messages`` is in Hugging Face's chat format and ends with an assistant turn; each ``{"type": "image"}`` part
    stands for the next image of ``media``. Other types of media work the same way.
    """

    id: str
    messages: list[Message]
    media: tuple[Medium, ...]  # in the order in which the row shows them
    image_options: ImageOptions = ImageOptions()
    answers: list[str]  # each answer that counts as right for the last turn
    captions: list[str] = field(default_factory=list)  # if given, each epoch trains on one of them as the last turn
    choices: dict[str, str] = field(default_factory=dict)  # if given, the only answers allowed: label -> its text
    meta: dict[str, Any] = field(default_factory=dict)
    unsupervised: frozenset[int] = frozenset()  # assistant turns, counted from 0, that are not supervised
    num_tokens: int | None = None  # with those of its images; None before they are counted for a base
    num_answer_tokens: int | None = None  # of its longest answer, with its end; None before they are counted

    @property
    def images(self) -> list[ImageSource]:
        """The sources of the row's images, in order."""
        return [medium.source for medium in self.media if isinstance(medium, Image)]

    @property
    def media_types(self) -> tuple[str, ...]:
        """The type of each medium, in order."""
        return tuple(medium.type for medium in self.media)

    @property
    def columns(self) -> dict[str, Any]:
        """The values of the columns that the row's task reads; empty if it reads none."""
        found: dict[str, Any] = self.meta.get(COLUMNS, {})
        return found

    @property
    def question_type(self) -> str:
        """The question type that scores are broken down by."""
        return str(self.meta.get("question_type", "all"))

    @property
    def prompt(self) -> list[Message]:
        """The messages before the last turn."""
        return self.messages[:-1]

    def in_epoch(self, epoch: int, *, seed: int) -> Example:
        """Return the row that an epoch trains on: with one of its captions, or unchanged if it has none.

        Args:
            epoch: the number of the epoch, from 0.
            seed: the seed of the run; the choice depends on it, the epoch and the row's id alone.
        """
        if not self.captions:
            return self
        return self.with_text(self.captions[draw(len(self.captions), seed, epoch, self.id, "caption")])

    def with_text(self, text: str) -> Example:
        """Return the row with ``text`` as its last turn."""
        return replace(self, messages=[*self.prompt, answer(text)])


def draw(count: int, *key: int | str) -> int:
    """Return a number from 0 to ``count`` - 1, uniformly distributed and determined by ``key`` alone."""
    digest = hashlib.sha256(json.dumps(key).encode()).digest()
    return int.from_bytes(digest[:8], "big") % count


def texts_to_choose_from(examples: Iterable[Example]) -> list[str]:
    """Return the different texts that any of ``examples`` may be answered with, in a fixed order."""
    return list(dict.fromkeys(text for example in examples for text in example.choices.values()))


def ask(
    question: str, *, num_images: int = 1, system_prompt: str | None = None, image_position: ImagePosition = "first"
) -> list[Message]:
    """Return the messages that put ``question`` to a model, with its images before or after it."""
    images, text = [{"type": "image"} for _ in range(num_images)], [{"type": "text", "text": question}]
    content = images + text if image_position == "first" else text + images
    return [*([system(system_prompt)] if system_prompt else []), {"role": "user", "content": content}]


def system(text: str) -> Message:
    """Return the system message with ``text``."""
    return {"role": "system", "content": [{"type": "text", "text": text}]}


def show(*, num_images: int = 1) -> list[Message]:
    """Return the user message with images and without a question."""
    return [{"role": "user", "content": [{"type": "image"} for _ in range(num_images)]}]


def answer(text: str) -> Message:
    """Return the assistant turn with ``text``."""
    return {"role": "assistant", "content": [{"type": "text", "text": text}]}


def text_of(message: Message) -> str:
    """Return the text of one message whose content is a list of parts."""
    return "".join(part["text"] for part in message["content"] if part["type"] == "text")
