"""Many finished adapters resident on one base; switching flips which one the model reads, and moves no weights."""

from __future__ import annotations

from typing import TYPE_CHECKING

from finetune.errors import AdapterError
from finetune.methods.adapter import switch

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class Switcher:
    """Which adapter answers. One at a time for the whole model: not for concurrent requests.

    Args:
        model: the base, with or without resident adapters.
    """

    def __init__(self, model: PreTrainedModel):
        self.model = model
        self.resident: set[str] = set()
        self.active: str | None = None
        self.refresh()

    def refresh(self) -> None:
        """Looks for adapters again; needed after an adapter was attached or detached."""
        self._switch = switch(self.model)
        self.use(self.active)

    def use(self, name: str | None) -> None:
        """Makes ``name`` the adapter that answers; None is the plain base.

        Raises:
            AdapterError: no adapter of that name is resident.
        """
        if name is not None and name not in self.resident:
            raise AdapterError(
                f"no adapter {name!r} is resident; there are: {', '.join(sorted(self.resident)) or 'none'}"
            )
        self._switch(name)
        self.active = name
