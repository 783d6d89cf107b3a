"""What a model said of a row."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

FinishReason = Literal["stop", "length"]


@dataclass(frozen=True, kw_only=True)
class Prediction:
    """A predicted answer.

    Attributes:
        text: without special tokens, and without white space around it.
        finish_reason: ``stop`` where the model ended its answer, or was told to; ``length`` where the row's limit did.
    """

    text: str
    finish_reason: FinishReason = "stop"
