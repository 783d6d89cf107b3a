"""Many questions at once, each for an adapter of its own: in as few batches as answers stay right."""

from __future__ import annotations

from typing import TYPE_CHECKING

from finetune.adapters.contract import section_of
from finetune.build import Batches
from finetune.recipe import VqaSection

if TYPE_CHECKING:
    from collections.abc import Hashable, Sequence

    from finetune.example import Example
    from finetune.recipe import TaskSection
    from finetune.serving.resident import Resident
    from finetune.serving.switcher import Switcher


def section_for(switcher: Switcher, resident: Resident | None) -> TaskSection:
    """Returns how an adapter is asked; a task's defaults for the plain base."""
    return section_of(resident.manifest.prompt) if resident else switcher.base.default_task


def answer_together(switcher: Switcher, examples: Sequence[Example], residents: Sequence[Resident | None]) -> list[str]:
    """Returns the answer of each row's adapter, as if it had been asked alone.

    Adapters of LoRA on the language tower, and the plain base, share a batch where their answers may be equally long;
    rows of any other adapter have a batch of their own.

    Args:
        switcher: of the model.
        examples: the rows, each put as its adapter is asked.
        residents: the adapter of each row, kept by the caller; None for the plain base.
    """
    groups: dict[Hashable, list[int]] = {}
    for index, resident in enumerate(residents):
        key: Hashable = resident
        if resident is None or switcher.can_share(resident):
            section = section_for(switcher, resident)
            key = section.max_new_tokens if isinstance(section, VqaSection) else None
        groups.setdefault(key, []).append(index)
    answers = [""] * len(examples)
    for group in groups.values():
        found = _answer(switcher, [examples[i] for i in group], [residents[i] for i in group])
        for index, text in zip(group, found, strict=True):
            answers[index] = text
    return answers


def _answer(switcher: Switcher, examples: Sequence[Example], residents: Sequence[Resident | None]) -> list[str]:
    base, first = switcher.base, residents[0]
    places = first.placeholders if first else None  # one that has a prompt shares with itself alone
    with switcher.answering(residents):
        with base.preparing:
            batch = Batches(base.collator, places).prompt_batch(examples)
        batch = batch.to(base.model.device, base.model.dtype)
        return base.task(section_for(switcher, first)).predict(base.model, batch)
