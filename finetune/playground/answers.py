"""Answers of the base and its adapters to the same image and question, one after the other."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import TYPE_CHECKING

from finetune.data.images import read_pixels
from finetune.errors import DataError, FinetuneError, RowError

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence
    from pathlib import Path

    import numpy as np

    from finetune.playground.catalog import CatalogEntry
    from finetune.serving.vision_language_model import VisionLanguageModel

MAX_QUESTION = 2000  # characters


@dataclass(frozen=True, kw_only=True)
class Answer:
    """The answer of the base or an adapter.

    Attributes:
        entry: the adapter; None for the plain base.
        text: the text of the answer.
        error: the message of the error; None for no error.
        was_loaded: True if the adapter was loaded for this answer.
        ready_ms: milliseconds to load and check the adapter, or to switch to it.
        answer_ms: milliseconds that the answer took.
    """

    entry: CatalogEntry | None
    text: str = ""
    error: str | None = None
    was_loaded: bool = False
    ready_ms: float = 0.0
    answer_ms: float = 0.0


def read_image(path: Path | None) -> np.ndarray:
    """Return the upright pixels of an image, as ``read_pixels`` returns them.

    Args:
        path: the path of the file; None for none.

    Raises:
        DataError: there is no image, or it cannot be read.
    """
    if path is None:
        raise DataError("There is no image yet. Choose a file, paste one, or take one of the examples.")
    try:
        return read_pixels(path, name=path.name)
    except RowError as error:  # without the path: PIL names the folder of the upload
        raise DataError(str(error).replace(str(path), path.name)) from None


def read_words(text: str, *, labels: bool) -> str | list[str]:
    """Return the question; or the labels, one per line or separated by commas.

    Raises:
        DataError: the text is empty or too long, or has fewer than two labels.
    """
    if len(text) > MAX_QUESTION:
        raise DataError(f"A question may have at most {MAX_QUESTION} characters, got {len(text)}. Shorten it.")
    if labels:
        parts = list(dict.fromkeys(label.strip() for line in text.splitlines() for label in line.split(",")))
        found = [label for label in parts if label]
        if len(found) < 2:
            raise DataError(f"Write at least two labels, one per line or separated by commas, got {len(found)}.")
        return found
    if not text.strip():
        raise DataError("The question is empty. Write a question about the image.")
    return text.strip()


def answer_side_by_side(
    vlm: VisionLanguageModel, image: np.ndarray, words: str | list[str], chosen: Sequence[CatalogEntry]
) -> Iterator[Answer]:
    """Yield the answer of the plain base, then that of each chosen adapter; an adapter that fails does not stop others.

    Args:
        vlm: the base.
        image: the image, as ``read_image`` returns it.
        words: the question; for a dual encoder the labels.
        chosen: the adapters.
    """
    # Never yield inside a `using` block: the caller may take the next answer in another thread or context.
    for entry in (None, *chosen):
        yield _answer(vlm, image, words, entry)


def _answer(vlm: VisionLanguageModel, image: np.ndarray, words: str | list[str], entry: CatalogEntry | None) -> Answer:
    if entry is not None and entry.refusal:
        return Answer(entry=entry, error=entry.refusal)
    there = vlm.switcher.loaded_adapters
    began = time.perf_counter()
    try:
        with vlm.using(entry.ref if entry else None):
            ready = time.perf_counter()
            text = vlm.ask(image, words) if isinstance(words, str) else vlm.classify(image, words)
            done = time.perf_counter()
            was_loaded = vlm.adapter is not None and vlm.adapter not in there
    except FinetuneError as error:
        return Answer(entry=entry, error=str(error))
    ready_ms, answer_ms = (ready - began) * 1000, (done - ready) * 1000
    return Answer(entry=entry, text=text, was_loaded=was_loaded, ready_ms=ready_ms, answer_ms=answer_ms)
