"""What the names that requests come with stand for, without asking the registry at each of them."""

from __future__ import annotations

import threading
import time
import warnings
from dataclasses import dataclass
from typing import TYPE_CHECKING

from finetune.adapters.reference import AdapterRef
from finetune.errors import FinetuneError

if TYPE_CHECKING:
    from collections.abc import Callable

    from finetune.registry import Version


@dataclass
class _Meaning:
    version: Version
    asked_at: float  # seconds, of a clock that never goes back
    failed: str = ""  # why it could not be renewed, when last tried


class Aliases:
    """Versions by reference, looked up again when they were for long; any thread may call any method.

    One caller at a time looks a reference up again, the others go on with what is known. What cannot be renewed is
    kept, with one warning for each reason: an app goes on with the version that it runs.

    Args:
        seconds: for which a version is taken for what its alias stands for; one that was named by its number or digest
            always stands for the same.
        clock: seconds that never go back.
    """

    def __init__(self, *, seconds: float, clock: Callable[[], float] = time.monotonic):
        self.seconds = seconds
        self._clock = clock
        self._meanings: dict[str, _Meaning] = {}
        self._renewing = threading.Lock()

    def version(self, ref: str, renew: Callable[[str], Version], *, now: bool = False) -> Version:
        """Returns the version that a reference stands for.

        Args:
            ref: such as ``medical/brain-mri@prod``.
            renew: looks it up and makes the version ready; called where it is not known, or was for too long.
            now: whether to look it up again in any case, waiting for whoever does already.

        Raises:
            FinetuneError: it was never known, and cannot be made ready.
        """
        meaning = self._meanings.get(ref)
        if meaning is None:
            version = renew(ref)
            self._meanings[ref] = _Meaning(version, self._clock())
            return version
        stale = AdapterRef.parse(ref).alias is not None and self._clock() - meaning.asked_at >= self.seconds
        if (now or stale) and self._renewing.acquire(blocking=now):
            try:
                self._renew(ref, meaning, renew)
            finally:
                self._renewing.release()
        return meaning.version

    def renew_all(self, renew: Callable[[str], Version]) -> None:
        """Looks up every reference that was ever asked for."""
        for ref in list(self._meanings):
            self.version(ref, renew, now=True)

    def _renew(self, ref: str, meaning: _Meaning, renew: Callable[[str], Version]) -> None:
        meaning.asked_at = self._clock()  # a registry that is down is not asked at every request either
        try:
            meaning.version, meaning.failed = renew(ref), ""
        except FinetuneError as error:
            if str(error) != meaning.failed:
                meaning.failed = str(error)
                warnings.warn(
                    f"{ref} still answers with version {meaning.version.version}: what it stands for now could not be "
                    f"made ready: {error}",
                    stacklevel=2,
                )
