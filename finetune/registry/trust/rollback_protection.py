"""Rollback protection: a reader remembers the newest entry of each log, and refuses an older state.

An attacker who controls a store can cut a log, or restore an older state. Every entry in it is still signed, so only a
reader who has seen a newer entry can notice. The record belongs to a location, not to the id in ``registry.json``,
which the attacker controls too.
"""

import contextlib
import os
import re
import shutil
from pathlib import Path

from finetune.adapters.manifest import sha256_hex
from finetune.core.file_owner import user_folder
from finetune.core.system_errors import explain
from finetune.errors import StoreError, TrustError

SEEN_VARIABLE = "FINETUNE_SEEN"

_MARK = re.compile(r"([0-9]{12})-([0-9a-f]{64})")
_ELSEWHERE = f" ({SEEN_VARIABLE})"


def default_seen() -> Path:
    """Return the folder of the memory: ``$FINETUNE_SEEN``, or ``~/.finetune/seen``."""
    return Path(os.environ.get(SEEN_VARIABLE) or user_folder() / "seen").expanduser().absolute()


class SeenEntries:
    """The newest entry of each log that was seen at one location.

    An entry is an empty file whose name is its number and digest. A newer file is made before older ones are removed,
    and the highest number counts. So any number of processes may write, none removes what another has seen, and no file
    is ever half written.
    """

    def __init__(self, location: str) -> None:
        """Open the memory of a registry.

        Args:
            location: the location of the registry; all paths to one folder share one memory.
        """
        place = location.rstrip("/") if "://" in location else str(Path(location).expanduser().resolve())
        self._folder = default_seen() / sha256_hex(place.encode())

    def newest(self, full_name: str) -> tuple[int, str] | None:
        """Return number and digest of the newest entry of ``ns/name`` that was seen; None for none.

        Raises:
            TrustError: the memory is damaged, or two entries have the same number.
            StoreError: the memory cannot be read.
        """
        seen = self._seen(full_name)
        if not seen:
            return None
        number = seen[-1][0]
        if len(newest := {digest for n, digest in seen if n == number}) > 1:
            raise TrustError(
                f"{full_name}: two different entries {number} were seen ({', '.join(sorted(newest))}), so its "
                f"log was replaced, or split in two. {_advice(full_name)}"
            )
        return seen[-1]

    def remember(self, full_name: str, number: int, digest: str) -> None:
        """Remember an entry, and forget those before it.

        Raises:
            StoreError: the memory cannot be written.
        """
        folder = self._folder / full_name
        try:
            folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            (folder / f"{number:012d}-{digest}").touch()
            for older, its_digest in self._seen(full_name):
                if older < number:
                    with contextlib.suppress(FileNotFoundError):
                        os.unlink(folder / f"{older:012d}-{its_digest}")
        except StoreError:  # an OSError too, and already explained
            raise
        except OSError as error:
            raise explain(error, folder, verb="write", elsewhere=_ELSEWHERE) from error

    def forget(self, full_name: str) -> bool:
        """Forget the entries of ``ns/name`` that were seen; return whether there were any.

        Raises:
            StoreError: the memory cannot be written.
        """
        try:
            shutil.rmtree(self._folder / full_name)
        except FileNotFoundError:
            return False
        except OSError as error:
            raise explain(error, self._folder / full_name, verb="delete", elsewhere=_ELSEWHERE) from error
        return True

    def _seen(self, full_name: str) -> list[tuple[int, str]]:
        """Return the entries in the memory, the newest last."""
        folder = self._folder / full_name
        names: list[str] | None = None
        try:
            # A single listing, while another process writes, may miss both the new file and the old one.
            while names != (now := sorted(os.listdir(folder))):
                names = now
        except FileNotFoundError:
            return []
        except OSError as error:
            raise explain(error, folder, verb="read", elsewhere=_ELSEWHERE) from error
        seen = []
        for name in names:
            match = _MARK.fullmatch(name)
            if match is None:
                raise TrustError(
                    f"{folder}: files must be named <number>-<sha256> after entries, got {name!r}. The memory of "
                    f"{full_name} is damaged. {_advice(full_name)}"
                )
            seen.append((int(match[1]), match[2]))
        return sorted(seen)


def _advice(full_name: str) -> str:
    return (
        f"Ask the administrator of the registry. If the log is right, run `finetune registry forget {full_name}` to "
        "begin the memory again."
    )
