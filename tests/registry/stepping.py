"""A store in memory with a clock that a test sets, and actors that do one store call at a time."""

import io
import threading
from datetime import UTC, datetime, timedelta

from finetune.registry.storage.store import AlreadyExists, ObjectMeta, ObjectMissing
from tests.registry.faulty import Interfering, Killed

START = datetime(2031, 3, 1, tzinfo=UTC)


class ClockedStore:
    """Objects in a dict; ``now`` is the store's clock."""

    def __init__(self):
        self.now = START
        self.objects: dict[str, tuple[bytes, datetime]] = {}

    def put(self, key, data, *, mode="create"):
        if mode == "create" and key in self.objects:
            raise AlreadyExists(f"{key} exists")
        self.objects[key] = (data if isinstance(data, bytes) else b"".join(data), self.now)

    def get(self, key):
        return io.BytesIO(self._find(key)[0])

    def head(self, key):
        data, modified = self._find(key)
        return ObjectMeta(key=key, size=len(data), modified=modified)

    def list(self, prefix=""):
        return iter([self.head(key) for key in self.objects if f"{key}/".startswith(f"{prefix}/" if prefix else "")])

    def delete(self, key):
        self.objects.pop(key, None)

    def _find(self, key):
        try:
            return self.objects[key]
        except KeyError:
            raise ObjectMissing(f"{key} is not there") from None

    def age(self, days: float) -> None:
        """Make everything that is there older."""
        self.objects = {k: (data, at - timedelta(days=days)) for k, (data, at) in self.objects.items()}


class Actor:
    """A function over a store in a thread of its own, which stops before each call of the store.

    Attributes:
        at: verb and key of the call that it stopped before.
        error: what the function raised; None when it returned.
    """

    def __init__(self, store, body):
        self.at = ("", "")
        self.error: BaseException | None = None
        self.ended = self._killed = False
        self._go, self._stopped = threading.Semaphore(0), threading.Semaphore(0)
        self._thread = threading.Thread(target=self._run, args=(Interfering(store, before=self._stop), body))
        self._thread.start()
        self._stopped.acquire()

    def _run(self, store, body):
        try:
            body(store)
        except BaseException as error:
            self.error = error
        self.ended = True
        self._stopped.release()

    def _stop(self, verb, key):
        self.at = (verb, key)
        if not self._killed:
            self._stopped.release()
            self._go.acquire()
        if self._killed:
            raise Killed(f"before {verb} {key}")

    def step(self, number: int | None = None) -> None:
        """Make so many calls of the store, or all that are left."""
        while not self.ended and number != 0:
            self._go.release()
            self._stopped.acquire()
            number = None if number is None else number - 1

    def kill(self) -> None:
        """End it before its next call; no further call of it reaches the store."""
        self._killed = True
        self.step(1)
        self._thread.join()
