"""Predictions of a base alone, kept on this machine: no adapter changes them, so a base makes them once.

Their key holds all values that could change them: base, processor, dtype, device, versions, the rows with their
images, the prompts of the task, and the rows of a batch.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, version
from typing import TYPE_CHECKING, Any

import torch

from finetune.adapters.manifest import canonical_json, sha256_hex
from finetune.core.cache import cache_home, read_note, write_note
from finetune.core.prediction import prediction_from_json
from finetune.data.image_checks import digests_of
from finetune.errors import DataError
from finetune.plugins import is_known, is_own, provider

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from finetune.assemble.base import Base
    from finetune.core.example import Example
    from finetune.core.prediction import Prediction
    from finetune.recipe import TaskSection

# Settings of a task that only compare predictions, and do not change them.
_COMPARISON = ("metrics", "answer_normalization", "decimal_separator")
_PACKAGES = ("torch", "transformers", "tokenizers", "numpy", "pillow", "finetune-vlm")


@dataclass(frozen=True)
class BasePredictions:
    """The stored predictions of one base for one task.

    Attributes:
        base: the base, without an adapter.
        task: the section of the task, which makes the prompts.
        batch_size: the number of rows of a batch; another number changes the order of sums.
        processes: the number of processes that share the rows, which decides the rows of a batch.
    """

    base: Base
    task: TaskSection
    batch_size: int
    processes: int = 1

    def read(self, examples: Sequence[Example]) -> list[Prediction] | None:
        """Return one prediction a row; None if not all of them are stored."""
        place = self._place(examples)
        note = None if place is None else read_note(place)
        try:
            found = [prediction_from_json(one) for one in json.loads(note)] if note is not None else None
        except (ValueError, DataError):
            return None
        return found if found is not None and len(found) == len(examples) else None

    def keep(self, examples: Sequence[Example], predictions: Sequence[Prediction]) -> None:
        """Store one prediction a row. A cache that cannot be written is no error."""
        text = json.dumps([prediction.to_json() for prediction in predictions], ensure_ascii=False)
        if place := self._place(examples):
            write_note(place, text)

    def _place(self, examples: Sequence[Example]) -> Path | None:
        """Return the path of the predictions of these rows; None if a package has no known version."""
        base = self.base
        versions = _versions(("tasks", self.task.name), ("families", base.identity.model_type))
        if versions is None:
            return None
        known_by = {
            "base": base.identity.digest,
            "processor": base.digests.model_dump(),
            "held": [str(base.model.dtype), base.quantization, base.model.device.type],
            "instructions": torch.backends.cpu.get_cpu_capability(),
            "attention": base.model.config._attn_implementation,
            "versions": versions,
            "task": self.task.model_dump(mode="json", exclude=set(_COMPARISON)),
            "batches": [self.batch_size, self.processes],
            "rows": [_row(example) for example in examples],
        }
        return cache_home() / "predictions" / sha256_hex(canonical_json(known_by))


def _versions(*names: tuple[str, str]) -> dict[str, str] | None:
    """Return the versions of all packages that make predictions; None if one of them has none."""
    try:
        found = {name: version(name) for name in _PACKAGES}
    except PackageNotFoundError:
        return None
    for group, name in names:
        if not is_own(group, name) and is_known(group, name) and (by := provider(group, name)):
            if by.package is None or by.version is None:
                return None
            found[by.package] = by.version
    return found


def _row(example: Example) -> list[Any]:
    own = [example.columns] if example.columns else []
    return [example.prompt, example.choices, digests_of(example), asdict(example.image_options), *own]
