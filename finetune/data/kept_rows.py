"""Rendered rows that are kept for the next epoch or evaluation."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Hashable

    from finetune.data.spans import Tokenized


@dataclass
class KeptRows:
    """Rendered rows by all that decides them. Kept rows stay: dropping the oldest helps no row of the next epoch.

    Attributes:
        room: the number of tokens that there is still room for, about 40 bytes each.
        rows: the key of each kept row -> the row.
    """

    room: int
    rows: dict[Hashable, Tokenized] = field(default_factory=dict)

    def get(self, key: Hashable) -> Tokenized | None:
        """Return the row of this key; None if it is not kept."""
        return self.rows.get(key)

    def keep(self, key: Hashable, row: Tokenized) -> None:
        """Keep a row if there is room for it."""
        if self.room >= len(row.ids):
            self.room -= len(row.ids)
            self.rows[key] = row
