"""What multimodal rotary models remember between the steps of a generation, kept apart for each context.

Qwen-VL and its kin keep the offset of their positions, ``rope_deltas``, on the module: of the generation that began
last, whoever runs. A second generation that begins before the first has ended would shift the first one's positions.
"""

from __future__ import annotations

from contextvars import ContextVar
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import nn

_NAME = "rope_deltas"


def keep_rope_deltas_apart(model: nn.Module) -> None:
    """Has each thread and task see the ``rope_deltas`` that it set itself; nothing else of ``model`` changes."""
    for module in model.modules():
        if _NAME in vars(module):
            value, own = vars(module).pop(_NAME), type(module)
            about = {_NAME: _PerContext(value), "__module__": own.__module__, "__qualname__": own.__qualname__}
            module.__class__ = type(own.__name__, (own,), about)


class _PerContext:
    def __init__(self, value: Any):
        self._value: ContextVar[Any] = ContextVar("finetune_rope_deltas", default=value)

    def __get__(self, module: Any, owner: type) -> Any:
        return self._value.get()

    def __set__(self, module: Any, value: Any) -> None:
        self._value.set(value)
