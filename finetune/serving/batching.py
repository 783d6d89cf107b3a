"""Answers to many questions at once, each by its own adapter, in as few batches as possible."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any, cast

from finetune.assemble.batches import Batches
from finetune.data.lengths import max_positions
from finetune.errors import DataError
from finetune.recipe import AnswerSection

if TYPE_CHECKING:
    from collections.abc import Callable, Hashable, Sequence

    from finetune.assemble.base import Base
    from finetune.core.batch import Batch
    from finetune.core.example import Example
    from finetune.interfaces import TaskCollator
    from finetune.recipe import PromptSection, TaskSection
    from finetune.serving.loaded_adapter import LoadedAdapter
    from finetune.serving.switcher import Switcher
    from finetune.tasks.generation import Answer, IsStopped, OnText
    from finetune.tasks.generative import GenerativeTask


def section_for(switcher: Switcher, loaded: LoadedAdapter | None) -> TaskSection:
    """Return the task section of an adapter; the default one for the plain base."""
    return loaded.manifest.task if loaded else switcher.base.default_task


def sharing_key(switcher: Switcher, loaded: LoadedAdapter | None) -> Hashable:
    """Return a key that is equal for adapters whose rows may share a batch.

    LoRA on the language tower and the base may share one, if their tasks make equal batches and generate any text.
    """
    section = section_for(switcher, loaded)
    generates = not isinstance(section, AnswerSection) or section.allowed_answers is None
    alone = None if loaded is None or (generates and switcher.can_share(loaded)) else loaded
    return id(switcher.base.collator_of(section)), alone


def answer_rows(
    switcher: Switcher,
    examples: Sequence[Example],
    loaded_adapters: Sequence[LoadedAdapter | None],
    *,
    max_new_tokens: Sequence[int | None] | None = None,
    on_text: OnText | None = None,
    is_stopped: IsStopped | None = None,
) -> list[Answer]:
    """Return the answer of each row's adapter, the same as for this row alone.

    Adapters of LoRA on the language tower, and the plain base, share a batch; any other adapter has its own batch.

    Args:
        switcher: the switcher of a model that generates text.
        examples: the rows, each with the prompt of its adapter's task.
        loaded_adapters: the adapter of each row, pinned by the caller; None for the plain base.
        max_new_tokens: the limit of each row; None for the longest answer in the training of its adapter.
        on_text: called in this thread with the number of a row and its new text, as in ``generate_answers``.
        is_stopped: called after each step with the number of a row; True ends that row early.

    Raises:
        DataError: an image cannot be used, or a row and its answer have more tokens than the base takes.
    """
    limits = max_new_tokens or [None] * len(examples)
    groups: dict[Hashable, list[int]] = {}
    for row, loaded in enumerate(loaded_adapters):
        groups.setdefault(sharing_key(switcher, loaded), []).append(row)
    answers: dict[int, Answer] = {}
    for rows in groups.values():
        own = [loaded_adapters[row] for row in rows]
        batch = prompt_batch(switcher, [examples[row] for row in rows], own)
        longest = [
            answer_limit(switcher, loaded_adapters[row], limits[row], prompt_tokens=length)
            for row, length in zip(rows, prompt_lengths(batch), strict=True)
        ]
        refuse_too_long(switcher.base, batch, longest)
        found = answer_batch(
            switcher,
            batch,
            own,
            max_new_tokens=longest,
            on_text=_of_rows(rows, on_text),
            is_stopped=_of_rows(rows, is_stopped),
        )
        answers.update(zip(rows, found, strict=True))
    return [answers[row] for row in range(len(examples))]


def prompt_batch(
    switcher: Switcher, examples: Sequence[Example], loaded_adapters: Sequence[LoadedAdapter | None]
) -> Batch:
    """Return the inputs of rows that share a batch, on the CPU.

    Args:
        switcher: the switcher of the model.
        examples: the rows, each with the prompt of its adapter's task.
        loaded_adapters: the adapter of each row; all have the same ``sharing_key``.
    """
    with switcher.base.preparing:
        return row_inputs(
            switcher.base.collator_of(section_for(switcher, loaded_adapters[0])), examples, loaded_adapters
        )


def row_inputs(
    collator: TaskCollator, examples: Sequence[Example], loaded_adapters: Sequence[LoadedAdapter | None]
) -> Batch:
    """Return the inputs of rows that share a batch, on the CPU; no other thread may use the collator meanwhile.

    Args:
        collator: the collator of their task.
        examples: the rows, as ``prompt_batch`` takes them.
        loaded_adapters: the adapter of each row, as ``prompt_batch`` takes them.
    """
    first = loaded_adapters[0]
    places = first.placeholders if first else None  # an adapter with a tuned prompt has its own batch
    examples = [opened_as_trained(row, loaded) for row, loaded in zip(examples, loaded_adapters, strict=True)]
    return Batches(collator, places).prompt_batch(examples)


def opened_as_trained(example: Example, loaded: LoadedAdapter | None) -> Example:
    """Return a row whose images are opened with the options of an adapter's training."""
    return replace(example, image_options=loaded.manifest.images.options) if loaded else example


def answer_batch(
    switcher: Switcher,
    batch: Batch,
    loaded_adapters: Sequence[LoadedAdapter | None],
    *,
    max_new_tokens: Sequence[int],
    on_text: OnText | None = None,
    is_stopped: IsStopped | None = None,
) -> list[Answer]:
    """Return the answers to a batch of ``prompt_batch``; the other arguments are those of ``answer_rows``."""
    base = switcher.base
    batch = batch.to(base.model.device, base.model.dtype)
    task = cast("GenerativeTask", base.task(section_for(switcher, loaded_adapters[0])))
    with switcher.activated(loaded_adapters):
        return task.answer(base.model, batch, max_new_tokens=max_new_tokens, on_text=on_text, is_stopped=is_stopped)


def prompt_lengths(batch: Batch) -> list[int]:
    """Return the number of tokens of each row of a batch, those of its images and of a tuned prompt included."""
    lengths: list[int] = batch.inputs["attention_mask"].sum(dim=1).tolist()
    return lengths


def answer_limit(switcher: Switcher, loaded: LoadedAdapter | None, wanted: int | None, *, prompt_tokens: int) -> int:
    """Return the maximum number of tokens of an answer.

    The plain base has no trained length. Without ``wanted``, its limit is the default length, or the room that the
    prompt leaves.

    Args:
        switcher: the switcher of the model.
        loaded: the adapter that answers; None for the plain base.
        wanted: the requested limit; None for the longest answer in the training of the adapter.
        prompt_tokens: the number of tokens of the row.
    """
    if wanted is not None:
        return wanted
    limit = cast("PromptSection", section_for(switcher, loaded)).longest_answer
    room = max_positions(switcher.base.model)
    return limit if loaded or room is None else max(1, min(limit, room - prompt_tokens))


def refuse_too_long(base: Base, batch: Batch, max_new_tokens: Sequence[int]) -> None:
    """Check that each row and its answer fit the base.

    Raises:
        DataError: a row and its answer have more tokens than the base takes.
    """
    room = max_positions(base.model)
    if room is None or "attention_mask" not in batch.inputs:  # a batch of images alone has no tokens
        return
    for example, length, longest in zip(batch.examples, prompt_lengths(batch), max_new_tokens, strict=True):
        if length + longest > room:
            raise DataError(
                f"{example.id}: the base takes {room} tokens; the row has {length} in its text and images, and up to "
                f"{longest} in its answer. Shorten the text, or use smaller images."
            )


def _of_rows(rows: Sequence[int], function: Callable[..., Any] | None) -> Callable[..., Any] | None:
    """Return ``function`` for the rows of one batch, whose numbers begin at 0."""
    return function and (lambda row, *rest: function(rows[row], *rest))
