"""Which adapters stay ready: as many as fit, the least recently used ones go first, and none that answers."""

from __future__ import annotations

import threading
from collections import Counter, OrderedDict
from typing import TYPE_CHECKING

from finetune.errors import AdapterError

if TYPE_CHECKING:
    from finetune.methods.points import Points
    from finetune.serving.resident import Resident


class Residency:
    """The resident adapters of one model, and how many requests each answers; any thread may call any method.

    Attributes:
        num_bytes: that the residents hold beside the base.

    Args:
        points: where they reach into the model.
        max_bytes: that they may hold together, beyond which those go that were not used for longest; None for any
            number. One that answers stays to the end of its last request, also where that is more for a while.
    """

    def __init__(self, points: Points, *, max_bytes: int | None = None):
        self.max_bytes, self.num_bytes = max_bytes, 0
        self._points = points
        self._residents: OrderedDict[str, Resident] = OrderedDict()  # by digest, the least recently used first
        self._uses: Counter[Resident] = Counter()  # requests that it answers, and once more as the default
        self._lock = threading.Lock()

    @property
    def residents(self) -> tuple[Resident, ...]:
        """The adapters that are ready, the least recently used first."""
        with self._lock:
            return tuple(self._residents.values())

    def get(self, digest: str) -> Resident | None:
        """Returns the resident with this manifest, if there is one."""
        return self._residents.get(digest)

    def put(self, resident: Resident) -> None:
        """Takes in an adapter whose modules are reached already; others may have to go.

        Raises:
            AdapterError: it alone holds more than may be held; its modules are left again.
        """
        if self.max_bytes is not None and resident.num_bytes > self.max_bytes:
            self._points.remove(resident.updates)
            raise AdapterError(
                f"{resident.ref} holds {resident.num_bytes} bytes, and all resident adapters together may hold "
                f"{self.max_bytes}. Raise max_bytes."
            )
        with self._lock:
            self._residents[resident.digest] = resident
            self.num_bytes += resident.num_bytes
            self._make_room(keep=resident)

    def hold(self, resident: Resident) -> bool:
        """Counts one more request that an adapter answers; False when it is not resident any more."""
        with self._lock:
            if self._residents.get(resident.digest) is not resident:
                return False
            self._uses[resident] += 1
            self._residents.move_to_end(resident.digest)
            return True

    def hold_again(self, resident: Resident) -> bool:
        """Counts one more request for an adapter that answers one, which it may do after it was removed.

        Returns:
            Whether it still answers any, or is resident.
        """
        with self._lock:
            if resident not in self._uses and self._residents.get(resident.digest) is not resident:
                return False
            self._uses[resident] += 1
            return True

    def let_go(self, resident: Resident) -> None:
        """Counts one request less."""
        with self._lock:
            self._uses[resident] -= 1
            if self._uses[resident]:
                return
            del self._uses[resident]
            if self._residents.get(resident.digest) is not resident:
                self._points.remove(resident.updates)
            self._make_room()

    def remove(self, ref: str | Resident) -> None:
        """Lets an adapter go; requests that it answers end as they began.

        Args:
            ref: the resident, or what it was asked for by when it was loaded.

        Raises:
            AdapterError: it is not resident.
        """
        with self._lock:
            resident = next((one for one in self._residents.values() if ref is one or ref == one.ref), None)
            if resident is None:
                names = ", ".join(sorted(one.ref for one in self._residents.values()))
                wanted = ref if isinstance(ref, str) else ref.ref
                raise AdapterError(f"{wanted} is not resident, so it cannot be removed; there are: {names or 'none'}")
            self._drop(resident)

    def _make_room(self, *, keep: Resident | None = None) -> None:
        if self.max_bytes is None or self.num_bytes <= self.max_bytes:
            return  # at every request: nothing here may grow with the number of residents
        for resident in [one for one in self._residents.values() if one is not keep and not self._uses[one]]:
            self._drop(resident)
            if self.num_bytes <= self.max_bytes:
                return

    def _drop(self, resident: Resident) -> None:
        del self._residents[resident.digest]
        self.num_bytes -= resident.num_bytes
        if not self._uses[resident]:
            self._points.remove(resident.updates)
