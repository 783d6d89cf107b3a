"""What can be made again: small notes that save reading large files twice. A cache that fails is no error."""

import hashlib
import os
import sqlite3
from collections.abc import Iterable, Mapping
from contextlib import closing
from pathlib import Path
from uuid import uuid4

_AT_ONCE = 500  # keys of one query; SQLite's own limit is higher


def cache_home() -> Path:
    """Returns the folder for what can be made again: ``$FINETUNE_CACHE``, else ``~/.finetune/cache``."""
    return Path(os.environ.get("FINETUNE_CACHE") or Path.home() / ".finetune" / "cache")


def write_note(path: Path, text: str) -> None:
    """Writes a small cache file aside and renames it; a cache that cannot be written is no error."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        # Threads and other machines may write the same note, so the name is nobody else's.
        aside = path.with_name(f"{path.name}.{uuid4().hex}.tmp")
        try:
            with open(aside, "x") as file:
                file.write(text)
            os.replace(aside, path)
        except OSError:
            aside.unlink(missing_ok=True)
    except OSError:
        return


def file_key(path: Path) -> str:
    """Returns what changes when a file does: its resolved path, inode, size and modification time.

    Raises:
        OSError: there is no such file.
    """
    resolved = path.resolve()
    stat = resolved.stat()
    return f"{resolved}\0{stat.st_ino}\0{stat.st_size}\0{stat.st_mtime_ns}"


class Notes:
    """Many short notes in one SQLite file, shared by processes.

    Args:
        name: of the file below ``cache_home()``.
    """

    def __init__(self, name: str):
        self.path = cache_home() / name

    def get(self, keys: Iterable[str]) -> dict[str, str]:
        """Returns the notes that are there."""
        digests = {_digest(key): key for key in keys}
        wanted = list(digests)
        found: dict[str, str] = {}
        try:
            with closing(self._connect()) as connection:
                for start in range(0, len(wanted), _AT_ONCE):
                    some = wanted[start : start + _AT_ONCE]
                    marks = ",".join("?" * len(some))
                    rows = connection.execute(f"SELECT key, note FROM notes WHERE key IN ({marks})", some)
                    found.update((digests[key], note) for key, note in rows)
        except (sqlite3.Error, OSError):
            return {}
        return found

    def put(self, notes: Mapping[str, str]) -> None:
        """Keeps ``notes``."""
        if not notes:
            return
        try:
            with closing(self._connect()) as connection, connection:
                rows = [(_digest(key), note) for key, note in notes.items()]
                connection.executemany("INSERT OR REPLACE INTO notes VALUES (?, ?)", rows)
        except (sqlite3.Error, OSError):
            return

    def _connect(self) -> sqlite3.Connection:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        connection = sqlite3.connect(self.path, timeout=30)  # seconds that a writer waits for another
        connection.execute("CREATE TABLE IF NOT EXISTS notes (key TEXT PRIMARY KEY, note TEXT NOT NULL)")
        return connection


def _digest(key: str) -> str:
    return hashlib.sha256(key.encode()).hexdigest()
