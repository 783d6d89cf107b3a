"""The batches of one adapter."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from finetune.data.collate import Collator

if TYPE_CHECKING:
    from collections.abc import Sequence

    from finetune.core.batch import Batch, Placeholders
    from finetune.core.example import Example
    from finetune.interfaces import TaskCollator


@dataclass(frozen=True)
class Batches:
    """The batches of one adapter: those of the collator, with the placeholders of the adapter's prompt if it has one.

    It holds nothing on a device, so that worker processes can have a copy.
    """

    collator: TaskCollator
    placeholders: Placeholders | None

    def training_batch(self, rows: list[tuple[Example, bool]]) -> Batch:
        """Return a batch of rows with labels."""
        return self._extend(self.collator.training_batch(rows))

    def prompt_batch(self, rows: Sequence[Example]) -> Batch:
        """Return a batch of rows to answer."""
        return self._extend(self.collator.prompt_batch(rows))

    def prompt_parts(self, row: Example) -> tuple[list[int], list[int]] | None:
        """Return the ids of a prompt up to its last image, which is one id for each image, and the ids after it.

        None if the collator does not know them before it makes a batch.
        """
        if not isinstance(self.collator, Collator):
            return None
        ids = self.collator.prompt(row).ids
        after = len(ids) - ids[::-1].index(self.collator.image_id) if self.collator.image_id in ids else 0
        return ids[:after], ids[after:]

    def _extend(self, batch: Batch) -> Batch:
        return self.placeholders.insert(batch) if self.placeholders else batch
