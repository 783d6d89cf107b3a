"""Rows of procedural worlds: two domains the pocket model has not seen, and the world it was trained on.

A program draws the medical phantoms and product images; they show no real patient or product.
"""

from dataclasses import replace
from typing import Any

from finetune.core.example import Example, answer, as_images
from finetune.errors import DataError
from finetune.lookup import did_you_mean
from finetune.pocket.medical import draw_phantom
from finetune.pocket.questions import QUESTION_TYPES
from finetune.pocket.retail import draw_product
from finetune.pocket.scene import Question, Scene
from finetune.pocket.world import draw_scene
from finetune.recipe import CAPTION_QUESTION, ProceduralData, TaskSection

_DRAW = {"medical": draw_phantom, "retail": draw_product}
QUESTION_TYPES_OF = {
    "medical": ("lesion", "margin", "size", "side", "cells"),
    "retail": ("garment", "color", "pattern", "tag"),
}


def read_domain(section: ProceduralData, split: str, *, task: TaskSection, seed: int, bad: Any) -> list[Example]:
    """Return the rows of one split, a pure function of the data's seed.

    Each image has one question, types in turn, or all its captions.

    Args:
        section: the recipe's data section.
        split: the name of the split: ``train``, ``val`` or ``test``; no two share an image.
        task: the section of the task.
        seed: the seed of the run; unused, since the rows depend on the data's own seed.
        bad: the record of unusable rows; unused, since the program draws none.

    Raises:
        DataError: the domain has no such question type.
    """
    known = QUESTION_TYPES_OF[section.name]
    types = section.question_types or known
    if strange := next((one for one in types if one not in known), None):
        hint = did_you_mean(strange, known)
        raise DataError(f"data.question_types must be among {', '.join(known)}, got {strange!r}.{hint}")
    rows = section.rows.get(split, 0)  # type: ignore[call-overload]
    examples: list[Example] = []
    index = 0
    while len(examples) < rows:
        scene = _DRAW[section.name](section.seed, split, index)
        row_id = f"{section.name}:{split}:{index}:0"
        if section.captions:
            examples.append(_captioned(row_id, scene, task))
        elif questions := [one for one in scene.questions if one.question_type in types]:
            examples.append(_example(row_id, scene, questions[index % len(questions)], task))
        index += 1
    return examples


def read_world(seed: int, split: str, *, rows_per_type: int, task: TaskSection) -> list[Example]:
    """Return rows of the pretraining world, ``rows_per_type`` of each question type; splits share no image."""
    left = dict.fromkeys(QUESTION_TYPES, rows_per_type)
    examples: list[Example] = []
    index = 0
    while any(left.values()):
        scene = draw_scene(seed, split, index)
        for number, question in enumerate(scene.questions):
            if left[question.question_type]:
                left[question.question_type] -= 1
                row_id = f"world:{split}:{index}:{number}"
                examples.append(_example(row_id, scene, question, task))
        index += 1
    return examples


def _captioned(row_id: str, scene: Scene, task: TaskSection) -> Example:
    text = task.own_question or CAPTION_QUESTION
    example = _example(row_id, scene, Question(question_type="all", text=text, answer=scene.captions[0]), task)
    return replace(example, answers=scene.captions, captions=[task.text_of(text) for text in scene.captions])


def _example(row_id: str, scene: Scene, question: Question, task: TaskSection) -> Example:
    return Example(
        id=row_id,
        messages=[*task.ask(question.text), answer(task.text_of(question.answer))],
        media=as_images([scene.image]),
        answers=[question.answer],
        meta={"question_type": question.question_type, "question": question.text, "image": row_id.rpartition(":")[0]},
    )
