"""Example images for the pocket base, drawn by the programs of its two synthetic domains."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from PIL import Image

from finetune.data.images import image_digest
from finetune.pocket.medical import draw_phantom
from finetune.pocket.retail import draw_product

if TYPE_CHECKING:
    from pathlib import Path

SPLIT = "example"  # a split that no run trains or evaluates on
# Each image's domain, its index, and the type of the suggested question.
_CHOSEN = (
    ("medical", 7, "lesion"),
    ("medical", 2, "side"),
    ("medical", 19, "cells"),
    ("retail", 10, "garment"),
    ("retail", 4, "color"),
    ("retail", 6, "tag"),
)
_DRAW = {"medical": draw_phantom, "retail": draw_product}


@dataclass(frozen=True, kw_only=True)
class ExampleImage:
    """One drawn image.

    Attributes:
        path: the path of its file.
        digest: the SHA-256 of the file.
        domain: the domain whose program drew it.
        question: the suggested question.
        answers: question -> right answer, for all questions that the program can answer.
    """

    path: Path
    digest: str
    domain: str
    question: str
    answers: dict[str, str]


def draw_examples(folder: Path) -> list[ExampleImage]:
    """Draw the examples into a folder."""
    examples = []
    for domain, index, question_type in _CHOSEN:
        scene = _DRAW[domain](0, SPLIT, index)
        path = folder / f"{domain}-{index}.png"
        Image.fromarray(scene.image).save(path)
        examples.append(
            ExampleImage(
                path=path,
                digest=image_digest(path),
                domain=domain,
                question=next(q.text for q in scene.questions if q.question_type == question_type),
                answers={question.text: question.answer for question in scene.questions},
            )
        )
    return examples


def right_answer(examples: list[ExampleImage], image: Path, question: str) -> str | None:
    """Return the answer of the program that drew an image; None for any other image or question."""
    digest = image_digest(image)
    asked = question.strip().casefold()
    for example in examples:
        if example.digest == digest:
            return next((a for q, a in example.answers.items() if q.casefold() == asked), None)
    return None
