"""A cache of small notes about large files, so that these are read once. A cache that fails raises no error.

The key of a note about a file is its ``file_key``. A note whose bytes have changed counts as missing.
"""

import hashlib
import os
import sqlite3
from collections.abc import Callable, Iterable, Mapping
from contextlib import closing, suppress
from pathlib import Path
from uuid import uuid4

from finetune.core.file_owner import user_folder
from finetune.core.file_state import file_state

_AT_ONCE = 500  # keys of one query; SQLite's own limit is higher
_SEAL = 16  # hexadecimal digits before each note of a database


def cache_home() -> Path:
    """Return the folder for files that can be made again: ``$FINETUNE_CACHE``, else ``~/.finetune/cache``."""
    return Path(os.environ.get("FINETUNE_CACHE") or user_folder() / "cache")


def conversions_of(files: Iterable[Path]) -> Path:
    """Return the folder for conversions of files by ``datasets``, whose own key is the time of the last write."""
    states = "\n".join(sorted(map(file_state, files)))
    return cache_home() / "datasets" / _sha256(_bytes(states))[:32]


def write_note(path: Path, text: str) -> None:
    """Write a small cache file aside and rename it; do nothing where the cache cannot be written."""
    body = _bytes(text)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        # Threads and other machines may write the same note, so each writer has a name of its own.
        aside = path.with_name(f"{path.name}.{uuid4().hex}.tmp")
        try:
            with open(aside, "xb") as file:
                file.write(_sha256(body).encode() + b"\n" + body)
            os.replace(aside, path)
        except OSError:
            aside.unlink(missing_ok=True)
    except OSError:
        return


def read_note(path: Path) -> str | None:
    """Return the text that ``write_note`` wrote; None if there is no note, or a byte of it has changed."""
    try:
        digest, _, body = path.read_bytes().partition(b"\n")
        return body.decode(errors="surrogatepass") if digest == _sha256(body).encode() else None
    except (OSError, ValueError):
        return None


class Notes:
    """Many short notes in one SQLite file, shared by processes.

    Args:
        name: the name of the file below ``cache_home()``.
    """

    def __init__(self, name: str):
        self.path = cache_home() / name

    def get(self, keys: Iterable[str]) -> dict[str, str]:
        """Return each key that has a note, with the note."""
        digests = {_sha256(_bytes(key)): key for key in keys}
        wanted = list(digests)
        found: dict[str, str] = {}

        def read(connection: sqlite3.Connection) -> None:
            for start in range(0, len(wanted), _AT_ONCE):
                some = wanted[start : start + _AT_ONCE]
                marks = ",".join("?" * len(some))
                for key, sealed in connection.execute(f"SELECT key, note FROM notes WHERE key IN ({marks})", some):
                    note = str(sealed)[_SEAL:]
                    if sealed == _sealed(key, note):
                        found[digests[key]] = note

        self._do(read)
        return found

    def put(self, notes: Mapping[str, str]) -> None:
        """Keep ``notes``."""
        if not notes:
            return
        rows = [(key, _sealed(key, note)) for key, note in ((_sha256(_bytes(k)), n) for k, n in notes.items())]

        def write(connection: sqlite3.Connection) -> None:
            with connection:
                connection.executemany("INSERT OR REPLACE INTO notes VALUES (?, ?)", rows)

        self._do(write)

    def _do(self, work: Callable[[sqlite3.Connection], None]) -> None:
        for _ in range(2):
            try:
                with closing(sqlite3.connect(self._place(), timeout=30)) as connection:  # seconds to wait for a writer
                    connection.text_factory = lambda data: data.decode(errors="replace")
                    connection.execute("CREATE TABLE IF NOT EXISTS notes (key TEXT PRIMARY KEY, note TEXT NOT NULL)")
                    return work(connection)
            except (sqlite3.Error, OSError) as error:
                # A damaged database would never keep a note again, so remove it. Leave a locked one alone.
                if type(error) is not sqlite3.DatabaseError:
                    return None
                self._remove()

    def _place(self) -> Path:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        return self.path

    def _remove(self) -> None:
        with suppress(OSError):
            for name in (self.path.name, f"{self.path.name}-journal"):
                self.path.with_name(name).unlink(missing_ok=True)


def _sealed(key: str, note: str) -> str:
    return _sha256(_bytes(f"{key} {note}"))[:_SEAL] + note


def _bytes(text: str) -> bytes:
    return text.encode(errors="surrogatepass")  # names of files need not be UTF-8


def _sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()
