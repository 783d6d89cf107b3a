"""Hooks of finished adapters in a model: a function in the place of ``forward``, for each module they change.

The function asks at every call which adapter answers in the present context, and lets that adapter's update for the
module compute; so threads and tasks that share one model each have their own adapter, and switching moves nothing.
The module tree, its parameters, buffers and hooks stay the base's own.
"""

from __future__ import annotations

import threading
from collections import Counter
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from functools import wraps
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping

    from torch import nn

    from finetune.interfaces import Update

_MARK = "is_an_adapter_hook"


@dataclass(frozen=True, kw_only=True, eq=False)
class ActiveAdapter:
    """The adapter that may answer, as full module name -> the update that replaces that module's ``forward``."""

    updates: Mapping[str, Update] = field(default_factory=dict, repr=False)


PLAIN = ActiveAdapter()  # the base, unchanged


class AdapterHooks:
    """The modules of one model that finished adapters reach, and the adapter that is active in each context.

    Each context (a thread, an asyncio task) has what its innermost ``using`` block says; where there is none, the
    ``default`` answers. A module is touched once, for the first adapter that changes it, and is as it was when the
    last one has gone. All methods may be called by any thread at any time.

    Attributes:
        default: the adapter that is active where no block names another.
    """

    def __init__(self) -> None:
        self.default: ActiveAdapter = PLAIN
        # One for each model: an adapter of one must not silence that of another, asked inside its block.
        self._active: ContextVar[ActiveAdapter] = ContextVar("finetune_active_adapter")
        self._reached: dict[str, tuple[nn.Module, Callable[..., Any], Callable[..., Any] | None]] = {}
        self._users: Counter[str] = Counter()  # module name -> how many adapters reach it
        self._lock = threading.Lock()

    @property
    def active(self) -> ActiveAdapter:
        """The adapter that is active in the present context."""
        return self._active.get(self.default)

    @contextmanager
    def using(self, adapter: ActiveAdapter) -> Iterator[None]:
        """Have something else answer inside the block, in this context alone; its modules must have been added."""
        token = self._active.set(adapter)
        try:
            yield
        finally:
            self._active.reset(token)

    def add(self, updates: Mapping[str, Update]) -> None:
        """Reach the modules of one more adapter; the active adapters do not change."""
        with self._lock:
            for name, update in updates.items():
                if not self._users[name]:
                    self._reach(name, update.module)
                self._users[name] += 1

    def remove(self, updates: Mapping[str, Update]) -> None:
        """Leave the modules of an adapter that was added and do not answer anywhere any more."""
        with self._lock:
            for name in updates:
                self._users[name] -= 1
                if not self._users[name]:
                    del self._users[name]
                    self._leave(name)

    def _reach(self, name: str, module: nn.Module) -> None:
        if name in self._reached:
            return
        inner, before = module.forward, vars(module).get("forward")
        get = self._active.get

        @wraps(inner)  # generate() reads the signature of the model's
        def forward(*args: Any, **kwargs: Any) -> Any:
            update = get(self.default).updates.get(name)
            return inner(*args, **kwargs) if update is None else update(inner, *args, **kwargs)

        setattr(forward, _MARK, True)
        vars(module)["forward"] = forward
        self._reached[name] = (module, forward, before)

    def _leave(self, name: str) -> None:
        module, forward, before = self._reached[name]
        if vars(module).get("forward") is not forward:
            return  # something was put over it, and calls it: it stays, passes on, and is used again
        del self._reached[name]
        if before is None:
            del vars(module)["forward"]
        else:
            vars(module)["forward"] = before


def reached(model: nn.Module) -> list[str]:
    """Return the names of the modules that finished adapters reach."""
    return [name for name, module in model.named_modules() if hasattr(vars(module).get("forward"), _MARK)]
