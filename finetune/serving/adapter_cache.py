"""The cache of loaded adapters. It removes the least recently used adapter first, and never a pinned one."""

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
        hooks: the hooks of the model, which apply the adapters.
        max_bytes: the limit, in bytes, for all loaded adapters together; None for no limit. Beyond it, the least
            recently used adapters are removed. A pinned adapter stays to the end of its last request, even above the
            limit.
    """

    def __init__(self, hooks: AdapterHooks, *, max_bytes: int | None = None):
        self.max_bytes, self.num_bytes = max_bytes, 0
        self._hooks = hooks
        # By digest, the least recently used first.
        self._loaded_adapters: OrderedDict[str, LoadedAdapter] = OrderedDict()
        self._uses: Counter[LoadedAdapter] = Counter()  # requests that each answers; the default counts as one
        self._lock = threading.Lock()

    @property
    def loaded_adapters(self) -> tuple[LoadedAdapter, ...]:
        """The loaded adapters, the least recently used first."""
        with self._lock:
            return tuple(self._loaded_adapters.values())

    def get(self, digest: str) -> LoadedAdapter | None:
        """Return the loaded adapter whose manifest has this digest; None if it is not loaded."""
        return self._loaded_adapters.get(digest)

    def put(self, loaded: LoadedAdapter) -> None:
        """Add an adapter whose hooks are in place already; this may remove others to make room.

        Raises:
            AdapterError: the adapter alone takes more bytes than the limit; its hooks are removed again.
        """
        if self.max_bytes is not None and loaded.num_bytes > self.max_bytes:
            self._hooks.remove(loaded.updates)
            raise AdapterError(
                f"All loaded adapters together may take {self.max_bytes} bytes, and {loaded.ref} alone takes "
                f"{loaded.num_bytes}. Raise max_bytes."
            )
        with self._lock:
            self._loaded_adapters[loaded.digest] = loaded
            self.num_bytes += loaded.num_bytes
            self._make_room(keep=loaded)

    def hold(self, loaded: LoadedAdapter) -> bool:
        """Pin an adapter for one more request; return False if it is not loaded any more."""
        with self._lock:
            if self._loaded_adapters.get(loaded.digest) is not loaded:
                return False
            self._uses[loaded] += 1
            self._loaded_adapters.move_to_end(loaded.digest)
            return True

    def hold_again(self, loaded: LoadedAdapter) -> bool:
        """Pin a pinned adapter once more, even if it was removed since.

        Returns:
            True if the adapter is still pinned or loaded.
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
        """Remove a loaded adapter; it still answers its running requests to their end.

        Args:
            ref: the loaded adapter, or the reference by which it was loaded.

        Raises:
            AdapterError: the adapter is not loaded.
        """
        with self._lock:
            loaded = next((one for one in self._loaded_adapters.values() if ref is one or ref == one.ref), None)
            if loaded is None:
                names = ", ".join(sorted(one.ref for one in self._loaded_adapters.values()))
                wanted = ref if isinstance(ref, str) else ref.ref
                raise AdapterError(
                    f"{wanted} cannot be removed, because it is not loaded. Loaded adapters: {names or 'none'}"
                )
            self._drop(loaded)

    def _make_room(self, *, keep: LoadedAdapter | None = None) -> None:
        if self.max_bytes is None or self.num_bytes <= self.max_bytes:
            return  # runs at every request, so its time must not grow with the number of adapters
        for loaded in [one for one in self._loaded_adapters.values() if one is not keep and not self._uses[one]]:
            self._drop(loaded)
            if self.num_bytes <= self.max_bytes:
                return

    def _drop(self, loaded: LoadedAdapter) -> None:
        del self._loaded_adapters[loaded.digest]
        self.num_bytes -= loaded.num_bytes
        if not self._uses[loaded]:
            self._hooks.remove(loaded.updates)
