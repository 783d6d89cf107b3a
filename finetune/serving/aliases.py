"""The versions of aliases, reused for some seconds so that not every request asks the registry."""

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
    asked_at: float  # seconds of a monotonic clock
    failed: str = ""  # the error of the last renewal


class Aliases:
    """Versions by reference, looked up again after some seconds; any thread may call any method.

    One caller at a time looks a reference up again, and the others use the known version. If the lookup fails, the
    known version stays, with one warning for each reason, as long as the trust policy accepts it.

    Args:
        renew: the function that looks a reference up and makes the version ready.
        check: the function that raises TrustError if the trust policy does not accept a version any more.
        seconds: the number of seconds for which the version of an alias is reused. A reference with a version number
            or digest is looked up once.
        clock: the function that returns the time of a monotonic clock, in seconds.
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

    def know(self, ref: str, version: Version) -> None:
        """Take a version that was just looked up elsewhere for that of a reference."""
        self._meanings[ref] = _Meaning(version, self._clock())

    def version(self, ref: str, *, now: bool = False) -> Version:
        """Return the version of a reference.

        Args:
            ref: a reference such as ``medical/brain-mri@prod``.
            now: True to look it up again in any case, after any other caller that does so already.

        Raises:
            FinetuneError: the reference is new, and its version cannot be loaded.
            TrustError: the lookup fails, and the trust policy does not accept the known version any more.
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
            TrustError: the trust policy does not accept one of the versions any more; the others were looked up.
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
        meaning.asked_at = self._clock()  # set before, so that not every request asks a registry that is down
        try:
            meaning.version, meaning.failed = self._find(ref), ""
        except FinetuneError as error:
            try:
                self._check(meaning.version)
            except TrustError:
                self._meanings.pop(ref, None)  # so that no later request gets it without a lookup
                raise
            if str(error) != meaning.failed:
                meaning.failed = str(error)
                warnings.warn(
                    f"{ref} still answers with version {meaning.version.version}: its present version could not be "
                    f"loaded: {safe_line(str(error))}",
                    stacklevel=2,
                )
