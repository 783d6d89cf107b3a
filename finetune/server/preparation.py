"""Preparation of a request: its images are decoded, and its prompt is rendered, tokenized and measured.

It runs in threads of its own, so other requests do not wait for it. Every step has a bound before it begins: the
base's context limits the characters of the messages, settings limit the pixels of an image, and a clock its decoding.
"""

from __future__ import annotations

import logging
from collections import defaultdict
from contextlib import contextmanager
from dataclasses import replace
from queue import Empty, SimpleQueue
from typing import TYPE_CHECKING

import torch

from finetune.data.lengths import max_positions
from finetune.errors import FinetuneError, RequestError, brief
from finetune.recipe import PromptSection
from finetune.server.prompts import to_example
from finetune.server.request_images import decode_images
from finetune.server.scheduler import Job
from finetune.server.stop_sequences import StopSequences
from finetune.serving.batching import answer_limit, prompt_lengths, row_inputs, section_for

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping

    from finetune.assemble.base import Base
    from finetune.core.batch import Batch
    from finetune.core.example import Example
    from finetune.data.image_workers import ImageWorkers
    from finetune.interfaces import TaskCollator
    from finetune.recipe import TaskSection
    from finetune.server.scheduler import Event
    from finetune.server.schema import ChatRequest
    from finetune.server.settings import Settings
    from finetune.serving.loaded_adapter import LoadedAdapter
    from finetune.serving.switcher import Switcher

_log = logging.getLogger(__name__)
CHARACTERS_PER_TOKEN = 32  # more than any text has on average; single tokens may have more
MOST_CHARACTERS = 1_000_000  # of the messages of a request; to tokenize them takes seconds


class Collators:
    """The collators of one base. Each thread that prepares a request has its own, so that threads do not wait.

    Args:
        base: the base of the model.
    """

    def __init__(self, base: Base):
        self._base = base
        self._idle: defaultdict[int, SimpleQueue[TaskCollator]] = defaultdict(SimpleQueue)  # of each kind of task

    @contextmanager
    def one(self, section: PromptSection) -> Iterator[TaskCollator]:
        """Yield a collator of a task; no other thread uses it inside the block."""
        shared = self._base.collator_of(section)
        idle = self._idle[id(shared)]
        try:
            collator = idle.get_nowait()
        except Empty:
            with self._base.preparing:
                collator = shared.copy()
        try:
            yield collator
        finally:
            idle.put(collator)


def prepare(
    request: ChatRequest,
    loaded: LoadedAdapter | None,
    *,
    switcher: Switcher,
    settings: Settings,
    fetched: Mapping[str, bytes],
    collators: Collators,
    workers: ImageWorkers,
    client: str,
    arrived: int,
    label: str,
    is_over: Callable[[], bool],
    on_event: Callable[[Event], None],
) -> Job:
    """Return a request as a job for the scheduler.

    Args:
        request: the request.
        loaded: the adapter that answers, pinned by the caller; None for the plain base.
        switcher: the switcher of the model.
        settings: the bounds of the server.
        fetched: the files of the images at URLs of other hosts, by URL.
        collators: the collators that make the inputs.
        workers: the workers that decode the images.
        client: the client that asks.
        arrived: the number of the request, in the order of arrival.
        label: the label of the adapter in metrics.
        is_over: the function that returns True once the client has gone.
        on_event: called with each event of the job.

    Raises:
        RequestError: the model cannot answer the request.
    """
    positions = max_positions(switcher.base.model)
    _refuse_long_text(request, positions)
    section = _prompt_section(request, section_for(switcher, loaded))
    page = loaded.manifest.images.options.page if loaded else None
    images = decode_images(request, settings, fetched=fetched, workers=workers, page=page, is_over=is_over)
    batch = _batch(collators, section, to_example(request, section, images), loaded)
    (length,) = prompt_lengths(batch)
    limit = answer_limit(switcher, loaded, request.max_completion_tokens or request.max_tokens, prompt_tokens=length)
    _refuse_long_row(positions, length, limit)
    stop = [request.stop] if isinstance(request.stop, str) else request.stop
    return Job(
        batch=batch,
        loaded=loaded,
        client=client,
        arrived=arrived,
        label=label,
        max_new_tokens=limit,
        stops=StopSequences(stop or ()),
        on_event=on_event,
    )


def _prompt_section(request: ChatRequest, section: TaskSection) -> PromptSection:
    """Return the task section of a request's adapter.

    Raises:
        RequestError: its task does not generate answers.
    """
    if isinstance(section, PromptSection):
        return section
    raise RequestError(
        f"`model` must name an adapter whose task generates text, got {request.model} of task {section.name}. Use it "
        f"in Python by {section.call}.",
        status=400,
        code="invalid_model",
        param="model",
    )


def _refuse_long_row(positions: int | None, length: int, limit: int) -> None:
    """Refuse a row that has more tokens with its answer than the base takes.

    Raises:
        RequestError: the row and its answer have too many tokens.
    """
    if positions is not None and length + limit > positions:
        raise RequestError(
            f"The base takes {positions} tokens; this request has {length} in its messages and images, and up to "
            f"{limit} in its answer. Shorten the messages, make the images smaller, or lower max_completion_tokens.",
            status=400,
            code="context_length_exceeded",
            param="messages",
        )


def _refuse_long_text(request: ChatRequest, positions: int | None) -> None:
    """Refuse messages with more characters than the context can hold, because their tokenization takes long.

    Raises:
        RequestError: the messages have too many characters.
    """
    num_characters = sum(
        len(message.content)
        if isinstance(message.content, str)
        else sum(len(part.text) for part in message.content if part.type == "text")
        for message in request.messages
    )
    most = MOST_CHARACTERS if positions is None else min(MOST_CHARACTERS, CHARACTERS_PER_TOKEN * positions)
    if num_characters > most:
        context = "" if positions is None else f"The base takes {positions} tokens, so "
        raise RequestError(
            f"{context or 'The '}messages may have at most {most} characters, got {num_characters}. Shorten them.",
            status=400,
            code="context_length_exceeded",
            param="messages",
        )


def _batch(collators: Collators, section: PromptSection, example: Example, loaded: LoadedAdapter | None) -> Batch:
    """Return the inputs of one row.

    Raises:
        RequestError: the processor cannot prepare the row; it may raise almost any error on unusual input.
    """
    try:
        with collators.one(section) as collator:
            batch = row_inputs(collator, [example], [loaded])
        # The inputs contain the images, so the pixels are freed while the request waits.
        return replace(batch, examples=[replace(example, media=())])
    except (FinetuneError, MemoryError, torch.OutOfMemoryError, torch.AcceleratorError):
        raise
    except Exception as error:
        _log.warning("a request cannot be prepared for this base", exc_info=error)
        what = str(error).strip().partition("\n")[0] or type(error).__name__
        raise RequestError(
            f"messages: the base's processor cannot prepare these messages: {brief(what, 200)}. Send images of another "
            "size, or another text.",
            status=400,
            code="invalid_messages",
            param="messages",
        ) from None
