"""Many finished adapters resident on one base; switching flips which one a context reads, and moves no weights."""

from __future__ import annotations

import threading
import warnings
from collections import Counter
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from finetune.adapters.folder import read_folder, verify
from finetune.adapters.reference import as_folder
from finetune.errors import AdapterError, NotFoundError
from finetune.methods.adapter import refuse_attached
from finetune.methods.points import PLAIN, Points
from finetune.serving.resident import Resident, bring_in

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from finetune.adapters.folder import AdapterFolder
    from finetune.build import Base
    from finetune.registry import AdapterRegistry


class Switcher:
    """Verified adapters on one base, and which of them answers where; any thread may call any method at any time.

    Each thread and each asyncio task has the adapter of its own ``using`` block, however many run at once. A thread
    does not inherit the block that it is started in, unlike a task and ``asyncio.to_thread``: whoever starts one gives
    it the context, as for streaming::

        with switcher.using("medical/brain-mri@prod"):
            Thread(target=copy_context().run, args=(model.generate,), kwargs=inputs).start()

    What answers stays whole to the end of its block, also when it is removed meanwhile; a context that is handed on
    has to end inside the block.

    Args:
        base: from ``load_base``.
        registry: where names are looked up.

    Raises:
        MethodError: an adapter trains in the base.
    """

    def __init__(self, base: Base, *, registry: AdapterRegistry | None = None):
        refuse_attached(base.model)
        self.base = base
        self.registry = registry
        self._points = Points()
        self._residents: dict[str, Resident] = {}  # digest of the manifest -> resident
        self._uses: Counter[Resident] = Counter()  # blocks that it answers in, and once more as the default
        self._lock = threading.Lock()  # of the tables
        self._loading = threading.Lock()  # one adapter at a time, which nobody who has a resident one waits for

    @property
    def residents(self) -> tuple[Resident, ...]:
        """The adapters that are ready, in the order they came."""
        return tuple(self._residents.copy().values())

    @property
    def num_bytes(self) -> int:
        """Bytes that the resident adapters hold beside the base."""
        return sum(resident.num_bytes for resident in self.residents)

    @property
    def active(self) -> Resident | None:
        """The adapter that answers here and now; None for the plain base."""
        answering = self._points.answering
        return answering if isinstance(answering, Resident) else None

    def add(self, ref: str | Path) -> Resident:
        """Loads an adapter beside those that are there, after every check; which one answers does not change.

        Args:
            ref: a registry reference such as ``medical/brain-mri@prod``, or an adapter's folder.

        Raises:
            AdapterError: it does not fit or is not what was saved; base and other adapters are untouched.
            NotFoundError: the registry has no such adapter.
        """
        digest, read = self._find(ref)
        if (resident := self._residents.get(digest)) is not None:
            return resident
        with self._loading:
            if (resident := self._residents.get(digest)) is not None:
                return resident
            resident = bring_in(self.base, self._points, read(), ref=str(ref))
            with self._lock:
                self._residents[digest] = resident
        return resident

    def remove(self, ref: str | Path | Resident) -> None:
        """Lets an adapter go; where it answers now, it does so to the end.

        Args:
            ref: what ``add`` returned, or what it was given when the adapter was loaded.

        Raises:
            AdapterError: it is not resident.
        """
        ref = str(ref) if isinstance(ref, Path) else ref
        with self._lock:
            resident = next((one for one in self._residents.values() if ref is one or ref == one.ref), None)
            if resident is None:
                names = ", ".join(sorted(one.ref for one in self._residents.values()))
                wanted = ref.ref if isinstance(ref, Resident) else ref
                raise AdapterError(f"{wanted} is not resident, so it cannot be removed; there are: {names or 'none'}")
            del self._residents[resident.digest]
            if not self._uses[resident]:
                self._points.remove(resident.updates)

    @contextmanager
    def using(self, ref: str | Path | Resident | None) -> Iterator[Resident | None]:
        """Has another adapter answer inside the ``with`` block, in this context alone; None is the plain base.

        Args:
            ref: as for ``add``, which loads what is not resident, or what that returned.

        Raises:
            AdapterError: as for ``add``; or a resident that was given is not there any more.
        """
        resident = self._hold(ref)
        try:
            with self._points.using(resident or PLAIN):
                yield resident
        finally:
            self._let_go(resident)

    @contextmanager
    def holding(self) -> Iterator[Resident | None]:
        """Has what answers now do so to the end of the block, whatever ``use`` says meanwhile.

        Raises:
            AdapterError: the context was handed on and outlived its block, and its adapter was removed since.
        """
        with self._lock:
            resident = self.active
            if resident is not None:
                if not self._uses[resident] and self._residents.get(resident.digest) is not resident:
                    raise AdapterError(f"{resident.ref} was removed, so it cannot answer any more. Add it again.")
                self._uses[resident] += 1
        try:
            with self._points.using(resident or PLAIN):
                yield resident
        finally:
            self._let_go(resident)

    def use(self, ref: str | Path | Resident | None) -> None:
        """Has another adapter answer from now on, wherever no ``using`` block says otherwise; None is the base.

        A ``generate`` that runs meanwhile in a thread without a block would go on with the new one: whoever calls the
        model itself there does it inside ``holding``, as ``ask`` does.
        """
        resident = self._hold(ref)
        with self._lock:
            before, self._points.default = self._points.default, resident or PLAIN
        self._let_go(before if isinstance(before, Resident) else None)

    def _hold(self, ref: str | Path | Resident | None) -> Resident | None:
        """Returns what ``ref`` means now, counted as used; it is loaded again where it is removed meanwhile."""
        while ref is not None:
            resident = ref if isinstance(ref, Resident) else self.add(ref)
            with self._lock:
                if self._residents.get(resident.digest) is resident:
                    self._uses[resident] += 1
                    return resident
            if resident is ref:
                raise AdapterError(f"{resident.ref} was removed, so it cannot answer any more. Add it again.")
        return None

    def _let_go(self, resident: Resident | None) -> None:
        if resident is None:
            return
        with self._lock:
            self._uses[resident] -= 1
            if not self._uses[resident]:
                del self._uses[resident]
                if self._residents.get(resident.digest) is not resident:
                    self._points.remove(resident.updates)

    def _find(self, ref: str | Path) -> tuple[str, Callable[[], AdapterFolder]]:
        """Returns the digest of the manifest that ``ref`` means now, and what reads and checks the adapter."""
        path = as_folder(ref)
        if path is not None:
            folder = read_folder(path, device=self.base.model.device)
            return folder.digest, lambda: folder
        if self.registry is None:
            raise NotFoundError("names are looked up in a registry, and this model was given none")
        registry, version = self.registry, self.registry.resolve(str(ref))  # each time: an alias may have moved

        def read() -> AdapterFolder:
            if version.warning:
                warnings.warn(version.warning, stacklevel=2)
            manifest, files = registry.read(version)
            return verify(
                manifest, files, digest=version.digest, source=Path(version.ref), device=self.base.model.device
            )

        return version.digest, read
