"""A batch whose rows are answered by different adapters, against an answer at a time and against PEFT's."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from benchmarks.measure import BenchmarkError
from finetune.core.example import Example, answer, as_images
from finetune.serving.batching import section_for

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from pathlib import Path

    from peft import PeftModel

    from finetune.serving.vision_language_model import VisionLanguageModel

RANKS = (4, 8, 16, 32) * 2  # the rank of each adapter, one a row


def measure_mixed(
    ours: VisionLanguageModel, theirs: PeftModel, folders: Sequence[Path], *, side: int | None, rounds: int
) -> dict[str, list[float]]:
    """Measure the times of the answers to a question a row, each row by another adapter, in alternating rounds.

    ``mixed`` is one ``ask_batch``, ``separate`` an ``ask`` for each row, and ``peft`` one ``generate`` with
    ``adapter_names`` on the batch that ours makes. Each time runs from images and questions to the answers' texts.

    Args:
        ours: the model that serves the adapters.
        theirs: the same base in PEFT.
        folders: the folders of the adapters, one a row.
        side: the side of each row's image, in pixels; None for questions without images.
        rounds: the number of rounds that count.

    Returns:
        Each way -> the time of each round, in seconds.

    Raises:
        BenchmarkError: the three ways do not give the same answers.
    """
    rows = _Rows.of(ours, theirs, folders, side=side)
    ways: dict[str, Callable[[], list[str]]] = {
        "mixed": lambda: ours.ask_batch(rows.images, rows.questions, adapters=rows.loaded_adapters),
        "separate": lambda: _ask_separately(ours, rows),
        "peft": lambda: _ask_peft(ours, theirs, rows),
    }
    times: dict[str, list[float]] = {who: [] for who in ways}
    for number in range(-1, rounds):
        answers = {}
        for who, way in ways.items():
            begun = time.perf_counter()
            answers[who] = way()
            if number >= 0:
                times[who].append(time.perf_counter() - begun)
        if not answers["mixed"] == answers["separate"] == answers["peft"]:
            raise BenchmarkError(f"a mixed batch must give the answers of single calls and of PEFT, got {answers}")
    return times


@dataclass(frozen=True, kw_only=True)
class _Rows:
    """The rows of the batch, and the adapter of each."""

    images: list[Any]  # one image, or None, for each row
    questions: list[str]
    loaded_adapters: list[Any]  # in the model that serves
    names: list[str]  # of the same adapters in PEFT

    @classmethod
    def of(cls, ours: VisionLanguageModel, theirs: PeftModel, folders: Sequence[Path], *, side: int | None) -> _Rows:
        """Load the adapters into both models, and return the rows; arguments as for ``measure_mixed``."""
        images: list[Any] = [None] * len(folders)
        if side is not None:
            images = [*np.random.default_rng(0).integers(0, 256, (len(folders), side, side, 3), dtype=np.uint8)]
        questions = [f"{row}: " + "what shape is red, and where is it? " * 8 for row in range(len(folders))]
        loaded_adapters = [ours.add(folder) for folder in folders]
        names = [f"m{row}" for row in range(len(folders))]
        for name, folder in zip(names, folders, strict=True):
            if name not in theirs.peft_config:
                theirs.load_adapter(str(folder), adapter_name=name)
        theirs.eval()
        return cls(images=images, questions=questions, loaded_adapters=loaded_adapters, names=names)


def _ask_separately(ours: VisionLanguageModel, rows: _Rows) -> list[str]:
    answers = []
    for loaded, image, question in zip(rows.loaded_adapters, rows.images, rows.questions, strict=True):
        with ours.using(loaded):
            answers.append(ours.ask(image, question))
    return answers


@torch.inference_mode()
def _ask_peft(ours: VisionLanguageModel, theirs: PeftModel, rows: _Rows) -> list[str]:
    first = rows.loaded_adapters[0]
    section = section_for(ours.switcher, first)
    examples = []
    for name, image, question in zip(rows.names, rows.images, rows.questions, strict=True):
        images = [] if image is None else [image]
        messages = [*section.ask(question, num_images=len(images)), answer("")]
        examples.append(Example(id=name, messages=messages, media=as_images(images), answers=[""]))
    inputs = ours.base.collator.prompt_batch(examples).inputs
    made = theirs.generate(
        **inputs,
        adapter_names=rows.names,
        max_new_tokens=first.manifest.task.max_new_tokens,
        do_sample=False,
        num_beams=1,
    )
    texts = ours.processor.batch_decode(made[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    return [text.strip() for text in texts]
