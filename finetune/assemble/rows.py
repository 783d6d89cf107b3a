"""The rows of a recipe, with the check that they fit the base."""

from __future__ import annotations

from typing import TYPE_CHECKING

from finetune.data.lengths import fitting, max_positions
from finetune.data.open_stream import open_stream
from finetune.data.splits import read_split, tally
from finetune.data.stream import Stream
from finetune.errors import DataError
from finetune.recipe import (
    HubData,
    MixData,
    ParquetData,
    PromptTuningSection,
    ReadSection,
    StreamableData,
)

if TYPE_CHECKING:
    from collections.abc import Callable

    from finetune.assemble.base import Base
    from finetune.core.example import Example
    from finetune.data.stream import Rows
    from finetune.recipe import Recipe


def examples_of(
    recipe: Recipe, split: str, *, base: Base | None = None, log: Callable[[str], None] = print
) -> list[Example]:
    """Read one split of a recipe's data; return an empty list if the recipe has no such split.

    Args:
        recipe: the whole recipe.
        split: ``train``, ``val`` or ``test``.
        base: the base that every row must fit; None for no check.
        log: the function that is called with each line about omitted rows.

    Raises:
        DataError: a row cannot be used.
    """
    bad = tally(recipe.data, split, log=log)
    examples = read_split(recipe.data, split, task=recipe.task, seed=recipe.seed, bad=bad)
    prepare = recipe.task.to_evaluate if split != "train" else list
    examples = prepare(examples)
    if base is not None and examples:
        limit = _max_length(recipe, base)
        room = _prompt_length(recipe) + (recipe.task.answer_room if split != "train" else 0)
        examples = fitting(examples, base.lengths(recipe.task), recipe.data, split, limit=limit, room=room, bad=bad)
    bad.conclude()
    return prepare(examples)  # again: nothing may come from an omitted row


def check_rows(recipe: Recipe) -> None:
    """Read every row and image once, before the weights of a base are loaded.

    It keeps notes about the images on disk, so that reading the rows again costs little. It skips a stream, and rows
    that a program draws.

    Raises:
        DataError: a row or an image cannot be used.
    """
    data = recipe.data
    for section in map(data.part, data.sources) if isinstance(data, MixData) else [data]:
        for split in ("train", "val", "test"):
            streams = split == "train" and isinstance(section, StreamableData) and section.streaming
            if isinstance(section, ReadSection) and not streams:
                bad = tally(section, split, log=lambda _: None)
                # The train rows determine the scale of images; in a mix, the train rows of all sources do.
                bad.is_part = split != "train" or isinstance(data, MixData)
                read_split(section, split, task=recipe.task, seed=recipe.seed, bad=bad)
                bad.conclude()


def training_rows(recipe: Recipe, *, base: Base | None = None, log: Callable[[str], None] = print) -> Rows:
    """Read the train rows of a recipe's data, or open their stream; arguments as for ``examples_of``."""
    if not isinstance(recipe.data, HubData | ParquetData) or not recipe.data.streaming:
        return examples_of(recipe, "train", base=base, log=log)
    limit = _max_length(recipe, base) if base else None
    return open_stream(
        recipe.data,
        task=recipe.task,
        seed=recipe.seed,
        bad=tally(recipe.data, "train", log=log),
        lengths=base.lengths(recipe.task) if base else None,
        limit=limit and limit - _prompt_length(recipe),
    )


def with_image_range(recipe: Recipe, rows: Rows) -> Recipe:
    """Return the recipe with the range of its images, if its train rows determine one."""
    if not isinstance(recipe.data, ReadSection) or recipe.data.image_range != "auto":
        return recipe
    first = rows.first if isinstance(rows, Stream) else rows
    found = next((row.image_options.range for row in first), None)
    if found is None:
        return recipe
    return recipe.model_copy(update={"data": recipe.data.model_copy(update={"image_range": list(found)})})


def _prompt_length(recipe: Recipe) -> int:
    """Return the number of tokens that the adapter's own prompt adds to a row."""
    return sum(part.num_virtual_tokens for part in recipe.parts if isinstance(part, PromptTuningSection))


def _max_length(recipe: Recipe, base: Base) -> int | None:
    """Return the largest number of tokens of a row; None for no bound."""
    most = max_positions(base.model)
    limit = recipe.data.max_length or most
    if limit and most and limit > most:
        raise DataError(
            f"data.max_length must be at most {most}, the number of tokens that the base takes, got {limit}. "
            "Lower it, or leave it out."
        )
    return limit
