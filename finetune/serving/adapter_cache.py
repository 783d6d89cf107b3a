"""The cache of loaded adapters: the least recently used ones go first, and never one that answers."""

from __future__ import annotations

import threading
from collections import Counter, OrderedDict
from typing import TYPE_CHECKING

from finetune.errors import AdapterError

if TYPE_CHECKING:
    from finetune.methods.hooks import AdapterHooks
    from finetune.serving.loaded_adapter import LoadedAdapter


class AdapterCache:
    """The loaded adapters of one model, and the number of requests that pin each; any thread may call any method.

    Attributes:
        num_bytes: the number of bytes that the loaded adapters take beside the base.

    Args:
        hooks: the hooks by which the adapters reach into the model.
        max_bytes: the limit, in bytes, for all loaded adapters together; None for no limit. Beyond it, the least
            recently used adapters are removed. A pinned one stays to the end of its last request, also where the limit
            is exceeded for a while.
    """

    def __init__(self, hooks: AdapterHooks, *, max_bytes: int | None = None):
        self.max_bytes, self.num_bytes = max_bytes, 0
        self._hooks = hooks
        self._loaded_adapters: OrderedDict[str, LoadedAdapter] = (
            OrderedDict()
        )  # by digest, the least recently used first
        self._uses: Counter[LoadedAdapter] = Counter()  # requests that it answers, and once more as the default
        self._lock = threading.Lock()

    @property
    def loaded_adapters(self) -> tuple[LoadedAdapter, ...]:
        """The adapters that are ready, the least recently used first."""
        with self._lock:
            return tuple(self._loaded_adapters.values())

    def get(self, digest: str) -> LoadedAdapter | None:
        """Return the loaded adapter whose manifest has this digest; None where there is none."""
        return self._loaded_adapters.get(digest)

    def put(self, loaded: LoadedAdapter) -> None:
        """Add an adapter whose hooks are in place already; others may be removed to make room.

        Raises:
            AdapterError: it alone takes more bytes than the limit; its hooks are removed again.
        """
        if self.max_bytes is not None and loaded.num_bytes > self.max_bytes:
            self._hooks.remove(loaded.updates)
            raise AdapterError(
                f"{loaded.ref} holds {loaded.num_bytes} bytes, and all loaded adapters together may hold "
                f"{self.max_bytes}. Raise max_bytes."
            )
        with self._lock:
            self._loaded_adapters[loaded.digest] = loaded
            self.num_bytes += loaded.num_bytes
            self._make_room(keep=loaded)

    def hold(self, loaded: LoadedAdapter) -> bool:
        """Pin an adapter for one more request; return False when it is not loaded any more."""
        with self._lock:
            if self._loaded_adapters.get(loaded.digest) is not loaded:
                return False
            self._uses[loaded] += 1
            self._loaded_adapters.move_to_end(loaded.digest)
            return True

    def hold_again(self, loaded: LoadedAdapter) -> bool:
        """Pin an adapter that is pinned already once more, also after it was removed.

        Returns:
            Whether it is pinned or loaded still.
        """
        with self._lock:
            if loaded not in self._uses and self._loaded_adapters.get(loaded.digest) is not loaded:
                return False
            self._uses[loaded] += 1
            return True

    def let_go(self, loaded: LoadedAdapter) -> None:
        """Unpin an adapter for one request."""
        with self._lock:
            self._uses[loaded] -= 1
            if self._uses[loaded]:
                return
            del self._uses[loaded]
            if self._loaded_adapters.get(loaded.digest) is not loaded:
                self._hooks.remove(loaded.updates)
            self._make_room()

    def remove(self, ref: str | LoadedAdapter) -> None:
        """Remove a loaded adapter; requests that it already answers run to their end.

        Args:
            ref: the loaded adapter, or the reference by which it was loaded.

        Raises:
            AdapterError: it is not loaded.
        """
        with self._lock:
            loaded = next((one for one in self._loaded_adapters.values() if ref is one or ref == one.ref), None)
            if loaded is None:
                names = ", ".join(sorted(one.ref for one in self._loaded_adapters.values()))
                wanted = ref if isinstance(ref, str) else ref.ref
                raise AdapterError(f"{wanted} is not loaded, so it cannot be removed; there are: {names or 'none'}")
            self._drop(loaded)

    def _make_room(self, *, keep: LoadedAdapter | None = None) -> None:
        if self.max_bytes is None or self.num_bytes <= self.max_bytes:
            return  # at every request: nothing here may grow with the number of loaded_adapters
        for loaded in [one for one in self._loaded_adapters.values() if one is not keep and not self._uses[one]]:
            self._drop(loaded)
            if self.num_bytes <= self.max_bytes:
                return

    def _drop(self, loaded: LoadedAdapter) -> None:
        del self._loaded_adapters[loaded.digest]
        self.num_bytes -= loaded.num_bytes
        if not self._uses[loaded]:
            self._hooks.remove(loaded.updates)
