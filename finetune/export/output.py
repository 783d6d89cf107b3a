"""An output folder that appears complete or not at all, and the clean-up after a killed writer."""

from __future__ import annotations

import errno
import fcntl
import os
import shutil
import signal
import stat
import threading
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING

from finetune.core.system_errors import explain
from finetune.errors import ExportError, StoreError
from finetune.registry.storage.location import refuse_in_registry

if TYPE_CHECKING:
    from collections.abc import Iterator

ELSEWHERE = " (--output)"
_LOCK, _NEW = "lock", "new"
_CAREFULLY = os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
_NOT_OURS = {
    errno.ELOOP,
    errno.ENOTDIR,
    errno.EISDIR,
}  # a link, or a file instead of a folder, or a folder instead of a file


def refuse_occupied(output: Path) -> None:
    """Check that an output is new or an empty folder, and that it is not in a registry.

    Raises:
        ExportError: ``output`` holds something.
        StoreError: ``output`` is in the folder of a registry, or cannot be read.
    """
    refuse_in_registry(output, elsewhere=ELSEWHERE)
    try:
        if output.is_symlink() or (output.exists() and (not output.is_dir() or any(output.iterdir()))):
            raise ExportError(
                f"The output must be new, and {output} holds something already. Choose another{ELSEWHERE}."
            )
    except OSError as error:
        raise explain(error, output, verb="read", elsewhere=ELSEWHERE) from error


@contextmanager
def new_output(output: Path) -> Iterator[Path]:
    """Yield an empty folder that becomes ``output`` when the block ends without an error, written to the disk.

    It is in a hidden folder beside ``output``, which is removed on any error, also on Ctrl-C and SIGTERM. A killed
    process leaves the hidden folder, and the next export to the same ``output`` clears it. The writer holds a lock,
    which the system releases when the process ends.

    Raises:
        ExportError: ``output`` holds something, another process writes it, or the hidden folder was not left by an
            export.
        StoreError: ``output`` cannot be written or is in a registry, or the block cannot read a file.
    """
    refuse_occupied(output)
    hidden = output.with_name(f".{output.name}.exporting")
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        with _locked(hidden, output) as aside, _stopping():
            new = aside / _NEW
            new.mkdir()
            yield new
            _to_disk(new, mode=(aside / _LOCK).stat().st_mode)
            refuse_occupied(output)
            os.rename(new, output)
            _sync(output.parent)
    except StoreError:  # it is an OSError too, with its explanation
        raise
    except OSError as error:
        place = Path(os.fsdecode(error.filename or hidden))
        if output.parent not in (place, *place.parents):  # a file of the adapter or its base
            raise explain(error, place, verb="read") from error
        raise explain(error, output, verb="write", elsewhere=ELSEWHERE) from error


def require_space(folder: Path, num_bytes: int) -> None:
    """Check that the disk of ``folder`` has room for ``num_bytes``.

    Raises:
        ExportError: the disk has less room.
    """
    free = shutil.disk_usage(folder).free
    if free < num_bytes:
        raise ExportError(
            f"The export needs {_size(num_bytes)}, and the disk has {_size(free)} free. Make room, or choose a folder "
            f"on another disk{ELSEWHERE}."
        )


@contextmanager
def _locked(aside: Path, output: Path) -> Iterator[Path]:
    """Yield ``aside``, which holds only the lock of this process, and remove it afterwards."""
    with ExitStack() as held:
        folder = _lock(aside, output, held)
        # By the folder's descriptor, so that a link in its place cannot lead to another folder.
        shutil.rmtree(_NEW, ignore_errors=True, dir_fd=folder)  # of a killed process
        try:
            yield aside
        finally:
            # The lock is removed last, so that the next export finds a folder that is already clear.
            shutil.rmtree(_NEW, ignore_errors=True, dir_fd=folder)
            with suppress(OSError):
                os.unlink(_LOCK, dir_fd=folder)
                aside.rmdir()


def _lock(aside: Path, output: Path, held: ExitStack) -> int:
    """Return the descriptor of ``aside``, and hold its lock until ``held`` is closed.

    Raises:
        ExportError: another process holds the lock, or ``aside`` is not the folder of an export.
    """
    while True:
        is_new = _make(aside)  # FileNotFoundError here is no race: the parent folder is missing
        with ExitStack() as opened:
            try:
                # Anything may be there: do not follow a link, and do not wait for a FIFO.
                folder = os.open(aside, os.O_RDONLY | os.O_DIRECTORY | _CAREFULLY)
                opened.callback(os.close, folder)
                if not is_new and os.fstat(folder).st_uid != os.geteuid():
                    raise _foreign(aside)
                file = os.open(_LOCK, os.O_RDWR | os.O_CREAT | _CAREFULLY, 0o666, dir_fd=folder)
                opened.callback(os.close, file)
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                if os.path.samestat(os.fstat(file), os.stat(_LOCK, dir_fd=folder)):
                    held.enter_context(opened.pop_all())
                    return folder
            except BlockingIOError:
                raise ExportError(
                    f"another process is exporting to {output} now. Wait, or choose another folder{ELSEWHERE}."
                ) from None
            except FileNotFoundError:  # its owner has just removed the folder, or the lock
                pass
            except OSError as error:
                if error.errno in _NOT_OURS:
                    raise _foreign(aside) from None
                raise


def _foreign(aside: Path) -> ExportError:
    return ExportError(
        f"{aside} is not a folder of a killed export of this user, so the export does not clear it. Remove it, or "
        f"choose another folder{ELSEWHERE}."
    )


def _make(folder: Path) -> bool:
    """Make a folder; return True if it is new."""
    try:
        folder.mkdir()
    except FileExistsError:
        return False
    return True


@contextmanager
def _stopping() -> Iterator[None]:
    """Let SIGTERM end the block by an exception, if nothing else handles it and this is the main thread."""

    def stop(signum: int, _frame: object) -> None:
        raise SystemExit(128 + signum)  # the exit code of shells

    handles = threading.current_thread() is threading.main_thread()
    if not handles or signal.getsignal(signal.SIGTERM) is not signal.SIG_DFL:
        yield
        return
    signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)


def _to_disk(folder: Path, *, mode: int) -> None:
    """Wait until every file below ``folder``, and every folder, is on the disk.

    Files get ``mode``, because safetensors makes files that only their owner can read.
    """
    for path in sorted(folder.rglob("*")):
        if path.is_file():
            path.chmod(stat.S_IMODE(mode))
        _sync(path)
    _sync(folder)


def _sync(path: Path) -> None:
    number = os.open(path, os.O_RDONLY)
    try:
        os.fsync(number)
    finally:
        os.close(number)


def _size(num_bytes: int) -> str:
    return f"{num_bytes / 1e9:.1f} GB" if num_bytes >= 1e8 else f"{num_bytes / 1e6:.1f} MB"
