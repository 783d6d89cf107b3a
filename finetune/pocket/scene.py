"""The records of a procedural image and its questions, the same for every world."""

from dataclasses import dataclass, field

import numpy as np


@dataclass(frozen=True)
class Thing:
    """One drawn object; position and radius in pixels."""

    shape: str
    color: str
    pattern: str
    size: str  # "small" or "large"
    x: float
    y: float
    radius: float


@dataclass(frozen=True, kw_only=True)
class Question:
    """One question about a scene."""

    question_type: str
    text: str
    answer: str


@dataclass(frozen=True, kw_only=True)
class Scene:
    """An image [64, 64, 3] uint8, the questions about it, and captions if its world has any.

    Worlds that train a vision tower also give ``cells``, the classes [8, 8, 3] of the object on each patch, and
    ``mask``, [64, 64] bool, true on objects.
    """

    image: np.ndarray
    questions: list[Question]
    captions: list[str] = field(default_factory=list)
    cells: np.ndarray | None = None
    mask: np.ndarray | None = None
