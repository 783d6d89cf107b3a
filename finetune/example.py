"""One row, whatever file it came from."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, TypeAlias

if TYPE_CHECKING:
    from pathlib import Path

    import numpy as np

# Where a picture is: a file, the bytes of one, or pixels [H, W, 3] uint8.
ImageSource: TypeAlias = "Path | bytes | np.ndarray"
Message: TypeAlias = dict[str, Any]


@dataclass(frozen=True, kw_only=True)
class Example:
    """One conversation about some pictures.

    ``messages`` is in Hugging Face's chat format and ends with the assistant turn that is learnt; each
    ``{"type": "image"}`` part stands for the next of ``images``.
    """

    id: str
    messages: list[Message]
    images: list[ImageSource]
    answers: list[str]  # all that count as right; the first is the one learnt
    meta: dict[str, Any] = field(default_factory=dict)

    @property
    def kind(self) -> str:
        """The question type that scores are broken down by."""
        return str(self.meta.get("kind", "all"))

    @property
    def prompt(self) -> list[Message]:
        """The messages before the learnt turn."""
        return self.messages[:-1]

    def in_epoch(self, epoch: int, *, seed: int) -> Example:
        """Returns the row as ``epoch`` sees it: a pure function of ``seed``, ``epoch`` and the row itself."""
        return self


def ask(question: str, *, num_images: int = 1, system_prompt: str | None = None) -> list[Message]:
    """Returns the messages that put ``question`` to a model, pictures first."""
    content = [{"type": "image"} for _ in range(num_images)] + [{"type": "text", "text": question}]
    system = [{"role": "system", "content": [{"type": "text", "text": system_prompt}]}] if system_prompt else []
    return [*system, {"role": "user", "content": content}]


def answer(text: str) -> Message:
    """Returns the assistant turn that says ``text``."""
    return {"role": "assistant", "content": [{"type": "text", "text": text}]}
