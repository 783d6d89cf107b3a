"""The stream of an answer, which a thread of its own generates while the caller reads."""

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
    """A function that generates the answer of one row."""

    def __call__(self, *, on_text: OnText, is_stopped: IsStopped) -> object:
        """Call ``on_text`` with each new piece of the answer, and end when ``is_stopped`` returns True."""
        ...


class _End:
    """The mark after the last piece, with the error that ended the answer; None for no error."""

    def __init__(self, error: BaseException | None):
        self.error = error


class TextStream(Iterator[str]):
    """The pieces of an answer, as they are generated; together they are the whole answer.

    The answer begins at once, in a thread of its own, with the adapter that was active then. An error in that thread is
    raised where the pieces are read. The thread ends at its next step when the caller leaves the stream early: by
    ``close``, its ``with`` block, an exception that interrupts the reading, or the deletion of the stream.

    Args:
        generate: the function that generates the answer.
        kept: the contexts to exit when the answer has ended, such as the pin of its adapter.
    """

    def __init__(self, generate: Generate, kept: ExitStack):
        self._pieces: SimpleQueue[str | _End] = SimpleQueue()
        self._stopped = Event()
        self._end: _End | None = None  # once it was read
        # The thread does not refer to this object, so that the object can be deleted meanwhile.
        self._thread = Thread(target=_make, args=(generate, kept, self._pieces, self._stopped), name="finetune-stream")
        finalize(self, self._stopped.set)
        try:
            self._thread.start()
        except RuntimeError:  # the system has no more threads
            kept.close()
            raise

    def __next__(self) -> str:
        """Return the next piece of text, never an empty one; wait for it.

        Raises:
            StreamClosedError: the stream was closed before its end.
        """
        if self._end is None and not self._stopped.is_set():
            try:
                piece = self._pieces.get()
            except BaseException:  # Ctrl-C
                self._stopped.set()
                raise
            if isinstance(piece, _End):
                self._pieces.put(piece)  # for other threads that wait
                self._end = piece
                self._thread.join()  # the thread ends now
            elif not self._stopped.is_set():
                return piece
        if self._stopped.is_set():
            raise StreamClosedError("The stream was closed before its end, so the answer is incomplete. Ask again.")
        assert self._end is not None
        raise self._end.error or StopIteration

    def close(self) -> None:
        """End the answer now, and wait for its thread."""
        if self._end is None:
            self._stopped.set()
        self._thread.join()

    def __enter__(self) -> TextStream:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()


def _make(generate: Generate, kept: ExitStack, pieces: SimpleQueue[str | _End], stopped: Event) -> None:
    error = None
    try:
        with kept:
            generate(on_text=lambda row, piece: pieces.put(piece), is_stopped=lambda row: stopped.is_set())
    except BaseException as raised:
        error = raised
    pieces.put(_End(error))
