"""A batch whose rows are answered by different adapters, against an answer at a time and against PEFT's."""

from __future__ import annotations

import time
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

RANKS = (4, 8, 16, 32) * 2  # of the adapters, one a row


def measure_mixed(
    ours: VisionLanguageModel, theirs: PeftModel, folders: Sequence[Path], *, side: int | None, rounds: int
) -> dict[str, list[float]]:
    """Times the answers to a question a row, each row by another adapter, in alternating rounds.

    ``mixed`` is one ``ask_batch``, ``separate`` an ``ask`` for each row, and ``peft`` one ``generate`` with
    ``adapter_names`` of the batch that ours makes. All is timed, from images and questions to the answers' texts.

    Args:
        ours: serves the adapters.
        theirs: the same base in PEFT.
        folders: of the adapters, one a row.
        side: of each row's image, in pixels; None for questions without images.
        rounds: that count.

    Raises:
        BenchmarkError: they do not give the same answers.
    """
    images: list[Any] = [None] * len(folders)
    if side is not None:
        images = [*np.random.default_rng(0).integers(0, 256, (len(folders), side, side, 3), dtype=np.uint8)]
    questions = [f"{row}: " + "what shape is red, and where is it? " * 8 for row in range(len(folders))]
    num_images = 0 if side is None else 1
    loaded_adapters = [ours.add(folder) for folder in folders]
    names = [f"m{row}" for row in range(len(folders))]
    for name, folder in zip(names, folders, strict=True):
        if name not in theirs.peft_config:
            theirs.load_adapter(str(folder), adapter_name=name)
    theirs.eval()

    def separate() -> list[str]:
        answers = []
        for loaded, image, question in zip(loaded_adapters, images, questions, strict=True):
            with ours.using(loaded):
                answers.append(ours.ask(image, question))
        return answers

    @torch.inference_mode()
    def peft() -> list[str]:
        section = section_for(ours.switcher, loaded_adapters[0])
        rows = [
            Example(
                id=name,
                messages=[*section.ask(question, num_images=num_images), answer("")],
                media=as_images([image] * num_images),
                answers=[""],
            )
            for name, image, question in zip(names, images, questions, strict=True)
        ]
        inputs = ours.base.collator.prompt_batch(rows).inputs
        made = theirs.generate(
            **inputs,
            adapter_names=names,
            max_new_tokens=loaded_adapters[0].manifest.task.max_new_tokens,
            do_sample=False,
            num_beams=1,
        )
        texts = ours.processor.batch_decode(made[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
        return [text.strip() for text in texts]

    ways: dict[str, Callable[[], list[str]]] = {
        "mixed": lambda: ours.ask_batch(images, questions, adapters=loaded_adapters),
        "separate": separate,
        "peft": peft,
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
            raise BenchmarkError("rows of different adapters are not answered alike together and apart")
    return times
