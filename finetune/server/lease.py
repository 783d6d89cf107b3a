"""The lease of an adapter, which pins it from the preparation of a request to its end."""

from __future__ import annotations

import threading
from contextlib import ExitStack
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from finetune.serving.loaded_adapter import LoadedAdapter
    from finetune.serving.switcher import Switcher


class Lease:
    """A pin of one adapter. ``close`` may come before another thread calls ``take``."""

    def __init__(self) -> None:
        self._kept = ExitStack()
        self._closed = False
        self._lock = threading.Lock()

    def take(self, switcher: Switcher, name: str | None) -> LoadedAdapter | None:
        """Return the adapter that ``name`` means now, pinned until ``close``."""
        with ExitStack() as kept:
            loaded = kept.enter_context(switcher.pin(name))
            with self._lock:
                if not self._closed:
                    self._kept.push(kept.pop_all())
        return loaded

    def close(self) -> None:
        """Unpin the adapter, now or as soon as ``take`` pins it."""
        with self._lock:
            self._closed = True
        self._kept.close()
