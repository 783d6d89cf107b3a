"""One split of any source: reading its rows, limiting their number, and checking every image."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np

from finetune.core.example import ImageOptions
from finetune.data.bad_rows import BadRows
from finetune.data.bit_depth import decide_range
from finetune.data.image_checks import check_images
from finetune.plugins import find
from finetune.recipe import ColumnData, ReadSection

if TYPE_CHECKING:
    from collections.abc import Callable

    from finetune.core.example import Example
    from finetune.recipe import RowsSection, TaskSection


def tally(section: RowsSection, what: str, *, log: Callable[[str], None]) -> BadRows:
    """Return an empty record of the faults of some rows, such as those of one split.

    Args:
        section: the section whose ``on_error`` decides what happens to rows that cannot be used.
        what: the name of the rows in errors and in the log.
        log: the function that logs each line about rows that were left out.
    """
    return BadRows(what, on_error=section.on_error if isinstance(section, ReadSection) else "error", log=log)


def read_split(section: RowsSection, split: str, *, task: TaskSection, seed: int, bad: BadRows) -> list[Example]:
    """Read one split; return an empty list if the recipe has no such split.

    Args:
        section: the recipe's data section.
        split: the name of the split: ``train``, ``val`` or ``test``.
        task: the section of the task that puts the questions.
        seed: the seed that chooses the rows under ``max_rows``, and the rows that a mix repeats.
        bad: the record of the rows that cannot be used; the caller that made it also concludes it.

    Raises:
        DataError: if a file or a row cannot be used; the message names file and row.
    """
    if getattr(section, split, "") is None:
        return []
    read = find("sources", section.source, what="data.source")
    examples: list[Example] = read(section, split, task=task, seed=seed, bad=bad)
    if not isinstance(section, ReadSection):
        return examples
    if isinstance(section, ColumnData):
        examples = _chosen(examples, section, split, seed=seed, bad=bad)
    return examples if bad.is_part else with_image_options(examples, section, what=split, log=bad.log)


def with_image_options(
    examples: list[Example], section: ReadSection, *, what: str, log: Callable[[str], None]
) -> list[Example]:
    """Return rows whose images were checked, with the settings that open the images, by ``decide_range``."""
    options = ImageOptions(range=decide_range(section, examples, what=what, log=log), page=section.image_page)
    return [replace(example, image_options=options) for example in examples] if options != ImageOptions() else examples


def _chosen(examples: list[Example], section: ColumnData, split: str, *, seed: int, bad: BadRows) -> list[Example]:
    """Return the rows under ``max_rows`` whose images can all be read."""
    if section.question_type is None and not _few_questions(examples):
        examples = [replace(example, meta=example.meta | {"question_type": "all"}) for example in examples]
    chosen = _capped(examples, section.max_rows.get(split), seed=seed)  # type: ignore[call-overload]
    bad.tried -= len(examples) - len(chosen)
    asked = [example for example in chosen if not example.meta.get("conversation")]
    for type in sorted({type for example in asked for type in example.media_types}):
        if without := sum(type not in example.media_types for example in asked):
            bad.log(f"{without} of {len(asked)} {split} rows have no {type}; the run uses them without one")
    return check_images(chosen, bad, max_pixels=section.max_image_pixels, page=section.image_page)


def _few_questions(examples: list[Example]) -> bool:
    """Return whether the rows repeat a few questions, so that each question can be a question type.

    Free-form questions cannot: the majority answer of a single row is always right, and a manifest would publish them.
    """
    different = {example.meta["question"] for example in examples}
    return len(different) <= 50 and 2 * len(different) <= len(examples)


def _capped(examples: list[Example], cap: int | None, *, seed: int) -> list[Example]:
    if cap is None or cap >= len(examples):
        return examples
    chosen = np.random.default_rng([seed, len(examples)]).permutation(len(examples))[:cap]
    return [examples[i] for i in sorted(chosen)]
