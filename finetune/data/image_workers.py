"""Worker processes that decode images; the pool reuses them, and kills one if an image takes too long."""

from __future__ import annotations

import atexit
import os
import signal
import subprocess
import sys
import threading
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from finetune.data.image_worker import receive, send
from finetune.data.images import ImageFacts
from finetune.errors import ImageWorkerError, RowError

if TYPE_CHECKING:
    from collections.abc import Iterator

DECODE_SECONDS = 20  # CPU time that one image may take
WAIT_SECONDS = 300.0  # wall-clock time that one image may take in a run: a file system may be slow
_CLOSED = "images must be decoded before the process exits, and this process is exiting. Wait for running work first."
_MAIN = "import sys; sys.path[:] = sys.argv[1:]; from finetune.data.image_worker import main; main()"


class ImageWorkers:
    """A pool of processes that decode images: one for each thread that decodes at the same time.

    Args:
        seconds: the wall-clock time that one image may take, in seconds.
    """

    def __init__(self, *, seconds: float = WAIT_SECONDS):
        self.seconds = seconds
        self._idle: list[_Worker] = []
        self._busy: set[_Worker] = set()
        self._lock = threading.Lock()
        self._closed = False

    def facts(self, source: Path | bytes, *, max_pixels: int, name: str | None = None, page: int | None) -> ImageFacts:
        """Read a whole image once, and return its facts as ``read_through`` does.

        Raises:
            RowError: as ``read_through``; also if the image takes too much time or memory, or crashes its decoder.
            ImageWorkerError: if no process can decode the image.
        """
        header, _ = self._ask(source, max_pixels=max_pixels, name=name, page=page, wants_pixels=False)
        size, values, colors = (header["facts"][key] for key in ("size", "values", "colors"))
        return ImageFacts(size=tuple(size), values=tuple(values) if values else None, colors=colors)

    def pixels(self, source: Path | bytes, *, max_pixels: int, name: str | None = None, page: int | None) -> np.ndarray:
        """Return the pixels as ``read_pixels`` does: [H, W, 3] uint8, or the values [H, W] of a deep grey image.

        Raises:
            RowError: as ``facts``.
            ImageWorkerError: as ``facts``.
        """
        header, payload = self._ask(source, max_pixels=max_pixels, name=name, page=page, wants_pixels=True)
        return np.frombuffer(payload, header["dtype"]).reshape(header["shape"])

    def close(self) -> None:
        """Kill the processes; a thread that waits for one of them gets an error."""
        with self._lock:
            self._closed = True
            workers = [*self._idle, *self._busy]
            self._idle.clear()
        for worker in workers:
            worker.kill()

    def _ask(self, source: Path | bytes, *, name: str | None, **options: Any) -> tuple[dict[str, Any], bytes]:
        name = name or ("the image" if isinstance(source, bytes) else str(source))
        path, payload = (None, source) if isinstance(source, bytes) else (str(source.absolute()), b"")
        with self._worker() as worker:
            header = {"path": path, "name": name, "seconds": DECODE_SECONDS, **options}
            answer = worker.ask(header, payload, self.seconds)
        if answer is None:
            if self._closed:
                raise ImageWorkerError(_CLOSED)
            if worker.is_late:
                raise RowError(
                    f"{name}: the image takes more than {min(self.seconds, DECODE_SECONDS):g} seconds to decode. Save "
                    "it as PNG.",
                    reason="image takes too long to decode",
                )
            raise RowError(f"{name}: the image crashes its decoder. Save it again as PNG.", reason="unreadable image")
        header, payload = answer
        if "error" in header:
            raise RowError(header["error"], reason=header["reason"])
        return header, payload

    @contextmanager
    def _worker(self) -> Iterator[_Worker]:
        with self._lock:
            if self._closed:
                raise ImageWorkerError(_CLOSED)
            worker = None
            while self._idle and worker is None:
                worker = self._idle.pop()
                if not worker.is_alive():  # the system may have ended it
                    worker.kill()
                    worker = None
        worker = worker or _Worker()
        with self._lock:
            self._busy.add(worker)
        try:
            yield worker
        finally:
            with self._lock:
                self._busy.discard(worker)
                if worker.is_alive() and not self._closed:
                    self._idle.append(worker)
                else:
                    worker.kill()


class _Worker:
    """One process; ``is_late`` is True if the process was killed because an image took too long."""

    def __init__(self) -> None:
        folders = [str(Path(__file__).resolve().parents[2]), *sys.path]
        # One thread: numpy would allocate memory for each core.
        env = {**os.environ, "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
        self.is_late = False
        try:
            self._process = subprocess.Popen(
                [sys.executable, "-P", "-c", _MAIN, *folders],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,  # decoders print their warnings about an image there
                env=env,
                start_new_session=os.name == "posix",  # this process alone handles the signals to its group
            )
        except OSError as error:
            raise ImageWorkerError(
                f"this system cannot start a process that decodes images: {error}. Check its limits of memory and "
                "processes."
            ) from error
        if self.ask(None, b"", 120.0) is None:
            raise ImageWorkerError(
                "the process that decodes images must start, but it ended with code "
                f"{self._process.wait()}. To see its error, run {sys.executable} -c 'import "
                "finetune.data.image_worker'"
            )

    def ask(self, header: dict[str, Any] | None, payload: bytes, seconds: float) -> tuple[dict[str, Any], bytes] | None:
        """Send a request and return its answer; None if the process ended or the request took too long.

        Args:
            header: the header of the request; None waits for the process to be ready.
            payload: the bytes of the request.
            seconds: the wall-clock time that the request may take, in seconds.
        """
        timer = threading.Timer(seconds, self._end_late)
        timer.daemon = True
        timer.start()
        try:
            assert self._process.stdin is not None and self._process.stdout is not None
            if header is not None:
                send(self._process.stdin, header, payload)
            answer = receive(self._process.stdout)
        except (OSError, ValueError):  # a pipe whose other end is closed
            answer = None
        finally:
            timer.cancel()
        if answer is None:
            self.kill()
            self.is_late = self.is_late or self._process.returncode == -getattr(signal, "SIGXCPU", 0)
        return answer

    def is_alive(self) -> bool:
        """Return whether the process takes more requests."""
        return self._process.poll() is None

    def kill(self) -> None:
        """End the process in any state."""
        self._process.kill()
        self._process.wait()
        for stream in (self._process.stdin, self._process.stdout):
            if stream is not None:
                try:
                    stream.close()
                except OSError:  # closing flushes bytes that the process no longer reads
                    pass

    def _end_late(self) -> None:
        self.is_late = True
        self._process.kill()


@cache
def _workers_of(pid: int) -> ImageWorkers:
    workers = ImageWorkers()
    atexit.register(workers.close)
    return workers


def image_workers() -> ImageWorkers:
    """Return the workers of this process; a forked process has its own."""
    return _workers_of(os.getpid())
