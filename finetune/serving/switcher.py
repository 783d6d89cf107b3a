"""Many finished adapters resident on one base; switching flips which one the layers read, and moves no weights."""

from __future__ import annotations

from typing import TYPE_CHECKING

from peft.tuners.tuners_utils import BaseTunerLayer

from finetune.errors import AdapterError

if TYPE_CHECKING:
    from torch import nn


class Switcher:
    """Which adapter answers. One at a time for the whole model: not for concurrent requests.

    Args:
        model: the base, with or without resident adapters.
    """

    def __init__(self, model: nn.Module):
        self.model = model
        self.resident: set[str] = set()
        self.active: str | None = None
        self._layers: list[BaseTunerLayer] = []
        self.refresh()

    def refresh(self) -> None:
        """Looks for adapter layers again; needed after an adapter was attached or detached."""
        self._layers = [m for m in self.model.modules() if isinstance(m, BaseTunerLayer)]
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
        # PEFT's own set_adapter walks all modules and touches every parameter's requires_grad.
        for layer in self._layers:
            layer._active_adapter = [name] if name is not None else []
            layer._disable_adapters = name is None
        self.active = name
