"""Rows from JSON Lines files beside their pictures."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from finetune.errors import DataError
from finetune.example import Example
from finetune.recipe import JsonlData, TaskSection


def read_jsonl(section: JsonlData, split: str, *, task: TaskSection, seed: int) -> list[Example]:
    """Reads one split.

    Args:
        section: the recipe's data section.
        split: ``train``, ``val`` or ``test``.
        task: how a question is put.
        seed: chooses the rows where ``max_rows`` caps them.

    Raises:
        DataError: naming file, line and field.
    """
    name = getattr(section, split)
    if name is None:
        return []
    root = Path(section.root)
    path = root / name
    try:
        lines = path.read_text(encoding="utf-8-sig").split("\n")
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror}). Check data.root and data.{split}.") from None
    except UnicodeDecodeError as error:
        raise DataError(f"{path}: not UTF-8: {error}") from None
    examples = [
        _example(section, root, f"{path.name}:{number}", path, number, line, task)
        for number, line in enumerate(lines, start=1)
        if line.strip()
    ]
    if not examples:
        raise DataError(f"{path}: no rows")
    if section.kind is None and not _few_questions(examples):
        examples = [replace(example, meta=example.meta | {"kind": "all"}) for example in examples]
    cap = section.max_rows.get(split)  # type: ignore[call-overload]
    if cap is not None and cap < len(examples):
        chosen = np.random.default_rng([seed, len(examples)]).permutation(len(examples))[:cap]
        examples = [examples[i] for i in sorted(chosen)]
    return examples


def _few_questions(examples: list[Example]) -> bool:
    """Tells whether the questions are a few that are put again and again, so that each is a type of its own.

    Free questions are not: a majority answer among one row is always right, and a manifest would publish them.
    """
    different = {example.meta["question"] for example in examples}
    return len(different) <= 50 and 2 * len(different) <= len(examples)


def _example(
    section: JsonlData, root: Path, row_id: str, path: Path, number: int, line: str, task: TaskSection
) -> Example:
    where = f"{path}, line {number}"
    try:
        row = json.loads(line)
    except ValueError as error:
        raise DataError(f"{where}: not JSON: {error}") from None
    if not isinstance(row, dict):
        raise DataError(f"{where}: a row is a JSON object, not {type(row).__name__}")
    image = root / _text(row, section.image, "image", where)
    if not image.is_file():
        raise DataError(f"{where}: the picture {image} does not exist")
    question = _text(row, section.question, "question", where) if task.has_question else ""
    said = row.get(section.answer)
    answers = said if isinstance(said, list) and said else [_text(row, section.answer, "answer", where)]
    if not all(isinstance(a, str) and a.strip() for a in answers):
        raise DataError(f"{where}: {section.answer!r} must be a text or a list of texts, none empty")
    kind = (question or "all") if section.kind is None else _text(row, section.kind, "kind", where)
    return Example(
        id=row_id,
        messages=[*task.ask(question), task.say(answers[0])],
        images=[image],
        answers=answers,
        meta={"kind": kind, "question": question},
    )


def _text(row: dict[str, Any], field: str, key: str, where: str) -> str:
    if field not in row:
        raise DataError(
            f"{where}: no field {field!r}; the row has {', '.join(row)}. Name the right one with data.{key}=FIELD."
        )
    value = row[field]
    if not isinstance(value, str) or not value.strip():
        raise DataError(f"{where}: {field!r} must be a text that is not empty, not {value!r}")
    return value
