"""The versions that aliases stand for, reused for some seconds so that not every request asks the registry."""

from __future__ import annotations

import threading
import time
import warnings
from dataclasses import dataclass
from typing import TYPE_CHECKING

from finetune.adapters.reference import AdapterRef
from finetune.core.outside_text import safe_line
from finetune.errors import FinetuneError, TrustError

if TYPE_CHECKING:
    from collections.abc import Callable

    from finetune.registry import Version

ALIAS_SECONDS = 10.0


@dataclass
class _Meaning:
    version: Version
    asked_at: float  # seconds, of a clock that never goes back
    failed: str = ""  # why it could not be renewed, when last tried


class Aliases:
    """Versions by reference, looked up again after some seconds; any thread may call any method.

    One caller at a time looks a reference up again, and the others go on with the known version. A version that cannot
    be renewed stays, with one warning for each reason: an app goes on with it, while it is vouched for.

    Args:
        renew: the function that looks a reference up and makes the version ready.
        check: the function that raises TrustError where nobody vouches for a version any more.
        seconds: the number of seconds for which the version of an alias is reused. A version that was named by its
            number or digest is always reused.
        clock: the function that returns the time in seconds, and never goes back.
    """

    def __init__(
        self,
        renew: Callable[[str], Version],
        check: Callable[[Version], None],
        *,
        seconds: float,
        clock: Callable[[], float] = time.monotonic,
    ):
        self.seconds = seconds
        self._find, self._check, self._clock = renew, check, clock
        self._meanings: dict[str, _Meaning] = {}
        self._renewing = threading.Lock()

    def version(self, ref: str, *, now: bool = False) -> Version:
        """Return the version that a reference stands for.

        Args:
            ref: a reference such as ``medical/brain-mri@prod``.
            now: whether to look it up again in any case, after any other caller who does so already.

        Raises:
            FinetuneError: it was never known, and cannot be made ready.
            TrustError: it cannot be renewed, and the version that it stood for is not vouched for any more.
        """
        meaning = self._meanings.get(ref)
        if meaning is None:
            version = self._find(ref)
            self._meanings[ref] = _Meaning(version, self._clock())
            return version
        stale = self._clock() - meaning.asked_at >= self.seconds and AdapterRef.parse(ref).alias is not None
        if (now or stale) and self._renewing.acquire(blocking=now):
            try:
                self._renew(ref, meaning)
            finally:
                self._renewing.release()
        return meaning.version

    def renew_all(self) -> None:
        """Look up every reference that was ever asked for.

        Raises:
            TrustError: one of them is not vouched for any more; the others were looked up.
        """
        refused = None
        for ref in list(self._meanings):
            try:
                self.version(ref, now=True)
            except TrustError as error:
                refused = error
        if refused is not None:
            raise refused

    def _renew(self, ref: str, meaning: _Meaning) -> None:
        meaning.asked_at = self._clock()  # a registry that is down is not asked at every request either
        try:
            meaning.version, meaning.failed = self._find(ref), ""
        except FinetuneError as error:
            try:
                self._check(meaning.version)
            except TrustError:
                self._meanings.pop(ref, None)  # so that nobody is given it who does not look it up
                raise
            if str(error) != meaning.failed:
                meaning.failed = str(error)
                warnings.warn(
                    f"{ref} still answers with version {meaning.version.version}: what it stands for now could not be "
                    f"made ready: {safe_line(str(error))}",
                    stacklevel=2,
                )
