"""Threads that work for many clients in turn, so that one client does not delay the others for long."""

from __future__ import annotations

import asyncio
import threading
from collections import Counter, deque
from typing import TYPE_CHECKING, Any, TypeVar

if TYPE_CHECKING:
    from collections.abc import Callable

T = TypeVar("T")


class Turns:
    """A pool of threads that runs functions, a bounded number at once; its methods are called in the event loop.

    Clients take turns: the next client is the one whose last work began longest ago. One client never has all threads.
    A thread counts until its function has returned, also if its client has gone. The threads do not keep the process
    from ending.

    Args:
        num_threads: the number of threads, at least 2.
        name: the name of the threads.
        may_begin: the function that returns True if work of a client may begin now; call ``go_on`` when its result may
            change.
    """

    def __init__(self, num_threads: int, *, name: str, may_begin: Callable[[str], bool] = lambda client: True):
        assert num_threads >= 2
        self._num_threads, self._name, self._may_begin = num_threads, name, may_begin
        self._running: Counter[str] = Counter()
        self._waiting: dict[str, deque[tuple[asyncio.Future[Any], Callable[[], Any]]]] = {}  # by client, next one first

    async def run(self, client: str, work: Callable[[], T]) -> T:
        """Return the result of ``work``, run in a thread when it is the client's turn."""
        future: asyncio.Future[T] = asyncio.get_running_loop().create_future()
        self._waiting.setdefault(client, deque()).append((future, work))
        self.go_on()
        try:
            return await future
        except asyncio.CancelledError:
            self._forget(client, future)  # at once: the work holds the body of a request
            raise

    def go_on(self) -> None:
        """Begin all work that may begin now."""
        while self._running.total() < self._num_threads and (client := self._next()) is not None:
            queue = self._waiting.pop(client)
            future, work = queue.popleft()
            if queue:
                self._waiting[client] = queue  # behind all other clients
            if not future.done():  # done: its request was cancelled
                self._begin(client, future, work)

    def _forget(self, client: str, future: asyncio.Future[Any]) -> None:
        left = deque(one for one in self._waiting.get(client, ()) if one[0] is not future)
        if left:
            self._waiting[client] = left
        else:
            self._waiting.pop(client, None)

    def _next(self) -> str | None:
        most = self._num_threads - 1
        return next((one for one in self._waiting if self._running[one] < most and self._may_begin(one)), None)

    def _begin(self, client: str, future: asyncio.Future[T], work: Callable[[], T]) -> None:
        loop = asyncio.get_running_loop()
        self._running[client] += 1

        def end(result: T | None, error: BaseException | None) -> None:
            self._running[client] -= 1
            if not self._running[client]:
                del self._running[client]
            try:
                if future.done():
                    return
                if error is None:
                    future.set_result(result)  # type: ignore[arg-type]
                else:
                    future.set_exception(error)
            finally:
                self.go_on()

        def conclude(result: T | None, error: BaseException | None) -> None:
            if not loop.is_closed():
                loop.call_soon_threadsafe(end, result, error)

        def run() -> None:
            try:
                result = work()
            except BaseException as error:  # no other name: the error holds this frame, which would hold the error
                conclude(None, error)
            else:
                conclude(result, None)

        try:
            threading.Thread(target=run, name=self._name, daemon=True).start()
        except RuntimeError as error:  # the system has no more threads
            loop.call_soon(end, None, error)
