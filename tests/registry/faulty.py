"""A store that does what it is asked to, and lets a test interfere."""

from collections.abc import Callable

Call = Callable[[str, str], None]


def ignore(verb: str, key: str) -> None:
    pass


class Killed(BaseException):
    """Stands for the death of the process: nothing catches it."""


class Interfering:
    """Calls ``before(verb, key)``, the store, and ``after(verb, key)``; raising in that loses the answer."""

    def __init__(self, store, after: Call = ignore, before: Call = ignore):
        self.store = store
        self.after = after
        self.before = before

    def _call(self, verb, key, answer):
        self.before(verb, key)
        try:
            return answer()
        finally:
            self.after(verb, key)

    def put(self, key, data, *, mode="create"):
        self._call("put", key, lambda: self.store.put(key, data, mode=mode))

    def get(self, key):
        opened = []
        try:
            return self._call("get", key, lambda: opened.append(self.store.get(key)) or opened[0])
        except BaseException:
            for file in opened:
                file.close()
            raise

    def head(self, key):
        return self._call("head", key, lambda: self.store.head(key))

    def list(self, prefix=""):
        return iter(self._call("list", prefix, lambda: list(self.store.list(prefix))))

    def delete(self, key):
        self._call("delete", key, lambda: self.store.delete(key))


class OneDeath:
    """Dies in the ``number``-th call, counted from 0, and never again."""

    def __init__(self, number: int):
        self.left = number

    def __call__(self, verb: str, key: str) -> None:
        self.left -= 1
        if self.left == -1:
            raise Killed(f"after {verb} {key}")
