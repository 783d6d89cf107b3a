"""An answer that is read while it is made, by a thread of its own."""

from __future__ import annotations

from collections.abc import Iterator
from queue import SimpleQueue
from threading import Event, Thread
from typing import TYPE_CHECKING, Protocol
from weakref import finalize

from finetune.errors import StreamClosedError

if TYPE_CHECKING:
    from contextlib import ExitStack

    from finetune.tasks.generation import IsStopped, OnText


class Generate(Protocol):
    """Makes an answer of one row."""

    def __call__(self, *, on_text: OnText, is_stopped: IsStopped) -> object:
        """Tell ``on_text`` what the answer grows by, and end where ``is_stopped``."""
        ...


class _End:
    """What comes after the last piece: nothing, or what went wrong."""

    def __init__(self, error: BaseException | None):
        self.error = error


class TextStream(Iterator[str]):
    """The pieces of an answer, as they are made; together they are the whole answer.

    Making it begins at once, in a thread of its own, with the adapter that was active then. What goes wrong there is
    raised where the pieces are read. Leaving it before the end, by ``close``, its ``with`` block, an exception that
    interrupts the reading, or by letting it go, ends that thread at its next step.

    Args:
        generate: makes the answer.
        kept: what is let go when that has come to its end.
    """

    def __init__(self, generate: Generate, kept: ExitStack):
        self._said: SimpleQueue[str | _End] = SimpleQueue()
        self._stopped = Event()
        self._end: _End | None = None  # once it was read
        # The thread knows nothing of this object, so that it can be let go meanwhile.
        self._thread = Thread(target=_make, args=(generate, kept, self._said, self._stopped), name="finetune-stream")
        finalize(self, self._stopped.set)
        try:
            self._thread.start()
        except RuntimeError:  # no more threads are to be had
            kept.close()
            raise

    def __next__(self) -> str:
        """Return the next piece of text, never an empty one; wait for it.

        Raises:
            StreamClosedError: it was closed before its end.
        """
        if self._end is None and not self._stopped.is_set():
            try:
                piece = self._said.get()
            except BaseException:  # Ctrl-C
                self._stopped.set()
                raise
            if isinstance(piece, _End):
                self._said.put(piece)  # for whoever else waits
                self._end = piece
                self._thread.join()  # which has nothing left to do
            elif not self._stopped.is_set():
                return piece
        if self._stopped.is_set():
            raise StreamClosedError("this answer was closed before its end, so its text is not whole; ask again")
        assert self._end is not None
        raise self._end.error or StopIteration

    def close(self) -> None:
        """End the answer where it is; return when nothing runs for it any more."""
        if self._end is None:
            self._stopped.set()
        self._thread.join()

    def __enter__(self) -> TextStream:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()


def _make(generate: Generate, kept: ExitStack, said: SimpleQueue[str | _End], stopped: Event) -> None:
    error = None
    try:
        with kept:
            generate(on_text=lambda row, piece: said.put(piece), is_stopped=lambda row: stopped.is_set())
    except BaseException as raised:
        error = raised
    said.put(_End(error))
