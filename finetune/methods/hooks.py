"""Hooks of finished adapters in a model: a function that replaces ``forward`` of each module that they change.

At every call the function looks up the active adapter of the context, and runs that adapter's update for the module. So
threads and tasks that share one model each have their own adapter, and a switch moves no tensor. The module tree, its
parameters, buffers and hooks stay those of the base.
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
    """An adapter that can be active, as full module name -> the update that replaces that module's ``forward``."""

    updates: Mapping[str, Update] = field(default_factory=dict, repr=False)


PLAIN = ActiveAdapter()  # the base, unchanged


class AdapterHooks:
    """The modules of one model with hooks of finished adapters, and the adapter that is active in each context.

    In a context (a thread, an asyncio task) the adapter of the innermost ``using`` block is active; outside of all
    blocks, ``default`` is. A module gets its hook with the first adapter that changes it, and loses it with the last.
    Any thread may call any method at any time.

    Attributes:
        default: the adapter that is active outside of all ``using`` blocks.
    """

    def __init__(self) -> None:
        self.default: ActiveAdapter = PLAIN
        # One for each model: a block for one model must not change the active adapter of another.
        self._active: ContextVar[ActiveAdapter] = ContextVar("finetune_active_adapter")
        self._reached: dict[str, tuple[nn.Module, Callable[..., Any], Callable[..., Any] | None]] = {}
        self._users: Counter[str] = Counter()  # module name -> number of adapters that change it
        self._lock = threading.Lock()

    @property
    def active(self) -> ActiveAdapter:
        """Return the adapter that is active in the present context."""
        return self._active.get(self.default)

    @contextmanager
    def using(self, adapter: ActiveAdapter) -> Iterator[None]:
        """Activate an adapter inside the block, in this context only; call ``add`` with its updates before."""
        token = self._active.set(adapter)
        try:
            yield
        finally:
            self._active.reset(token)

    def add(self, updates: Mapping[str, Update]) -> None:
        """Add the hooks of one more adapter; the active adapters do not change."""
        with self._lock:
            for name, update in updates.items():
                if not self._users[name]:
                    self._reach(name, update.module)
                self._users[name] += 1

    def remove(self, updates: Mapping[str, Update]) -> None:
        """Remove the hooks of an adapter, which must not be active in any context."""
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

        @wraps(inner)  # generate() reads the signature of the model's forward
        def forward(*args: Any, **kwargs: Any) -> Any:
            update = get(self.default).updates.get(name)
            return inner(*args, **kwargs) if update is None else update(inner, *args, **kwargs)

        setattr(forward, _MARK, True)
        vars(module)["forward"] = forward
        self._reached[name] = (module, forward, before)

    def _leave(self, name: str) -> None:
        module, forward, before = self._reached[name]
        if vars(module).get("forward") is not forward:
            return  # another wrapper calls the hook: it stays, calls the base, and is used again
        del self._reached[name]
        if before is None:
            del vars(module)["forward"]
        else:
            vars(module)["forward"] = before


def reached(model: nn.Module) -> list[str]:
    """Return the names of the modules with hooks of finished adapters."""
    return [name for name, module in model.named_modules() if hasattr(vars(module).get("forward"), _MARK)]
