"""Trained adapters loaded on one base. A switch changes the active adapter of a context, and moves no weights."""

from __future__ import annotations

import threading
import warnings
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from finetune.adapters.folder import read_folder, verify
from finetune.adapters.reference import as_folder
from finetune.core.outside_text import safe_line
from finetune.errors import AdapterError, NotFoundError
from finetune.methods.adapter import refuse_attached
from finetune.methods.hooks import PLAIN, ActiveAdapter, AdapterHooks
from finetune.methods.mixed import can_mix, mix
from finetune.serving.adapter_cache import AdapterCache
from finetune.serving.aliases import ALIAS_SECONDS, Aliases
from finetune.serving.loaded_adapter import LoadedAdapter, bring_in

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from finetune.adapters.folder import AdapterFolder
    from finetune.assemble.base import Base
    from finetune.registry import AdapterRegistry, Version
    from finetune.registry.log.version_files import Contents


class Switcher:
    """The verified adapters on one base, and the active one of each context; any thread may call any method.

    Each thread and each asyncio task has the adapter of its own ``using`` block, however many run at once. A task and
    ``asyncio.to_thread`` inherit the block in which they start, and a thread does not. Give a new thread the context,
    as for streaming::

        with switcher.using("medical/brain-mri@prod"):
            Thread(target=copy_context().run, args=(model.generate,), kwargs=inputs).start()

    The active adapter stays loaded to the end of its block, even if it is removed meanwhile. A context that another
    thread gets must end inside the block.

    Args:
        base: the loaded base, as ``load_base`` returns it.
        registry: the registry in which names are looked up; None for none.
        max_bytes: the limit, in bytes, for all loaded adapters together; None for no limit. Beyond it, the least
            recently used adapters are removed; a pinned one stays to the end of its last request.
        alias_seconds: the number of seconds for which a resolved alias is reused before the registry is asked again.
            If the registry or the new version fails, the present version stays, with a warning.

    Raises:
        MethodError: the base has an adapter in training.
    """

    def __init__(
        self,
        base: Base,
        *,
        registry: AdapterRegistry | None = None,
        max_bytes: int | None = None,
        alias_seconds: float = ALIAS_SECONDS,
    ):
        refuse_attached(base.model)
        self.base = base
        self.registry = registry
        self._hooks = AdapterHooks()
        self._cache = AdapterCache(self._hooks, max_bytes=max_bytes)
        self._aliases = Aliases(self._look_up, self._check_trust, seconds=alias_seconds)
        self._loading = threading.Lock()  # one adapter at a time; requests for loaded ones do not wait
        self._choosing = threading.Lock()  # of the default

    @property
    def loaded_adapters(self) -> tuple[LoadedAdapter, ...]:
        """The loaded adapters, the least recently used first."""
        return self._cache.loaded_adapters

    @property
    def num_bytes(self) -> int:
        """The number of bytes that the loaded adapters take beside the base."""
        return self._cache.num_bytes

    @property
    def active(self) -> LoadedAdapter | None:
        """The active adapter of this context; None for the plain base."""
        active = self._hooks.active
        return active if isinstance(active, LoadedAdapter) else None

    def add(self, ref: str | Path) -> LoadedAdapter:
        """Load an adapter beside the others, after every check; the active adapter does not change.

        Args:
            ref: a registry reference such as ``medical/brain-mri@prod``, or an adapter's folder.

        Raises:
            AdapterError: the adapter is damaged, or does not fit the base; the base and other adapters are unchanged.
            NotFoundError: the registry has no such adapter.
        """
        path = as_folder(ref)
        if path is None:
            return self._ready(str(ref), self._aliases.version(str(ref)))
        folder = read_folder(path, device=self.base.model.device)
        return self._bring_in(str(ref), folder.digest, lambda: folder)

    def add_version(self, ref: str, version: Version, contents: Contents) -> LoadedAdapter:
        """Load a version that was just resolved from a reference and read; as ``add`` does.

        Args:
            ref: the reference.
            version: its version.
            contents: the manifest of the version and the function that reads its files, from ``AdapterRegistry.read``.

        Raises:
            AdapterError: as for ``add``.
        """
        loaded = self._ready(ref, version, contents)
        self._aliases.know(ref, version)
        return loaded

    def refresh(self) -> None:
        """Look up every requested alias again, and load its present version.

        Running requests keep their version. If the lookup fails, the known version stays, with a warning.

        Raises:
            TrustError: a lookup fails, and the trust policy does not accept the known version any more; then its
                reference does not answer.
        """
        self._aliases.renew_all()

    def remove(self, ref: str | Path | LoadedAdapter) -> None:
        """Remove a loaded adapter; it still answers its running requests to their end.

        Args:
            ref: the loaded adapter that ``add`` returned, or the reference by which it was loaded.

        Raises:
            AdapterError: the adapter is not loaded.
        """
        self._cache.remove(str(ref) if isinstance(ref, Path) else ref)

    @contextmanager
    def using(self, ref: str | Path | LoadedAdapter | None) -> Iterator[LoadedAdapter | None]:
        """Activate another adapter inside the ``with`` block, in this context alone; None is the plain base.

        Args:
            ref: a reference as for ``add``, which is loaded if necessary, or a loaded adapter.

        Raises:
            AdapterError: as for ``add``; or the given adapter is not loaded any more.
        """
        with self.pin(ref) as loaded, self._hooks.using(loaded or PLAIN):
            yield loaded

    @contextmanager
    def mixing(self, refs: Sequence[str | Path | LoadedAdapter | None]) -> Iterator[None]:
        """Activate one adapter for each row of a batch inside the block, in this context alone.

        Args:
            refs: the adapter of each row, in their order, as for ``using``.

        Raises:
            AdapterError: as for ``using``; or an adapter cannot share a batch, see ``can_share``.
        """
        with ExitStack() as kept:
            rows = [kept.enter_context(self.pin(ref)) for ref in refs]
            for loaded in rows:
                if loaded is not None and not self.can_share(loaded):
                    raise AdapterError(
                        f"{loaded.ref} cannot share a batch with other adapters: only LoRA on the language tower "
                        "can. Give its rows a batch of their own, as ask_batch() does."
                    )
            kept.enter_context(self.activated(rows))
            yield

    @contextmanager
    def activated(self, rows: Sequence[LoadedAdapter | None]) -> Iterator[None]:
        """Activate the pinned adapter of each row: one for all rows, or several that can share a batch."""
        first = rows[0]
        alike = all(row is first for row in rows)
        mixed = first or PLAIN if alike else ActiveAdapter(updates=mix([row.updates if row else {} for row in rows]))
        with self._hooks.using(mixed):
            yield

    def can_share(self, loaded: LoadedAdapter) -> bool:
        """Return True if an adapter can answer some rows of a batch while others answer the rest."""
        return can_mix(loaded.updates, self.base.towers)

    @contextmanager
    def pin(self, ref: str | Path | LoadedAdapter | None) -> Iterator[LoadedAdapter | None]:
        """Pin an adapter to the end of the block; the active adapter does not change. ``ref`` is as for ``using``."""
        loaded = self._hold(ref)
        try:
            yield loaded
        finally:
            self._let_go(loaded)

    @contextmanager
    def pin_active(self) -> Iterator[LoadedAdapter | None]:
        """Pin the active adapter to the end of the block, which may end in another context.

        Raises:
            AdapterError: the context outlived its ``using`` block in another thread, and its adapter was removed since.
        """
        with self._choosing:  # the default must not change before it is pinned
            loaded = self.active
            if loaded is not None and not self._cache.hold_again(loaded):
                raise AdapterError(f"{loaded.ref} must be loaded to answer, but it was removed. Add it again.")
        try:
            yield loaded
        finally:
            self._let_go(loaded)

    @contextmanager
    def holding(self) -> Iterator[LoadedAdapter | None]:
        """Keep the active adapter active to the end of the block, even if ``use`` changes the default meanwhile.

        Raises:
            AdapterError: as for ``pin_active``.
        """
        with self.pin_active() as loaded, self._hooks.using(loaded or PLAIN):
            yield loaded

    def use(self, ref: str | Path | LoadedAdapter | None) -> None:
        """Activate another adapter from now on, outside of ``using`` blocks; None is the plain base.

        A ``generate`` that runs in a thread without a block would continue with the new adapter. Call the model inside
        ``holding``, as ``ask`` does.
        """
        loaded = self._hold(ref)
        with self._choosing:
            before, self._hooks.default = self._hooks.default, loaded or PLAIN
        self._let_go(before if isinstance(before, LoadedAdapter) else None)

    def _hold(self, ref: str | Path | LoadedAdapter | None) -> LoadedAdapter | None:
        """Return the present adapter of ``ref``, pinned; load it again if it was removed meanwhile."""
        while ref is not None:
            loaded = ref if isinstance(ref, LoadedAdapter) else self.add(ref)
            if self._cache.hold(loaded):
                return loaded
            if loaded is ref:
                raise AdapterError(f"{loaded.ref} must be loaded to answer, but it was removed. Add it again.")
        return None

    def _let_go(self, loaded: LoadedAdapter | None) -> None:
        if loaded is not None:
            self._cache.let_go(loaded)

    def _look_up(self, ref: str) -> Version:
        version = self._registry().resolve(ref)
        self._ready(ref, version)
        return version

    def _check_trust(self, version: Version) -> None:
        self._registry().guard.check_manifest(version)

    def _ready(self, ref: str, version: Version, contents: Contents | None = None) -> LoadedAdapter:
        def fetch() -> AdapterFolder:
            if version.warning:
                warnings.warn(safe_line(version.warning), stacklevel=2)
            manifest, files = contents or self._registry().read(version)
            source, device = Path(version.ref), self.base.model.device
            return verify(manifest, files, digest=version.digest, source=source, device=device)

        return self._bring_in(ref, version.digest, fetch)

    def _bring_in(self, ref: str, digest: str, read: Callable[[], AdapterFolder]) -> LoadedAdapter:
        if (loaded := self._cache.get(digest)) is not None:
            return loaded
        with self._loading:
            if (loaded := self._cache.get(digest)) is not None:
                return loaded
            loaded = bring_in(self.base, self._hooks, read(), ref=ref)
            self._cache.put(loaded)
        return loaded

    def _registry(self) -> AdapterRegistry:
        if self.registry is None:
            raise NotFoundError(
                "To load an adapter by name, the model needs a registry, got none. Give registry= or a folder."
            )
        return self.registry
