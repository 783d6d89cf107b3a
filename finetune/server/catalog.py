"""The catalog of adapters that a server offers, and their loading, with few requests to the registry."""

from __future__ import annotations

import asyncio
import logging
import time
from collections import OrderedDict
from concurrent.futures import ThreadPoolExecutor
from datetime import datetime
from fnmatch import fnmatchcase
from typing import TYPE_CHECKING

from finetune.adapters.reference import AdapterRef
from finetune.errors import AdapterReferenceError, FinetuneError, RequestError, brief, plain
from finetune.server.errors import to_request_error
from finetune.server.schema import Model

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Sequence

    from finetune.registry import Version
    from finetune.serving.switcher import Switcher

_log = logging.getLogger(__name__)

BASE = "base"
_MOST_LOADING = 8  # adapters that are loaded or resolved at once
_MOST_REFUSED = 1024  # names whose failed load is remembered


class Catalog:
    """The catalog of one server; its methods are called in the event loop.

    Args:
        switcher: the switcher of the model.
        refs: the references of the adapters that clients may always ask.
        allow: the patterns of further adapters that clients may ask, as in ``Settings``.
        known_seconds: the number of seconds for which a failed load and the list of the registry are reused.
        clock: the function that returns the time in seconds, and never goes back.
    """

    def __init__(
        self,
        switcher: Switcher,
        refs: Sequence[str],
        *,
        allow: Sequence[str],
        known_seconds: float,
        clock: Callable[[], float] = time.monotonic,
    ):
        self._switcher, self._allow, self._known_seconds, self._clock = switcher, allow, known_seconds, clock
        self._refs = [str(AdapterRef.parse(ref)) for ref in refs]
        self._ready: set[str] = set(self._refs)
        self._loading: dict[str, asyncio.Future[None]] = {}
        self._refused: OrderedDict[str, tuple[float, RequestError]] = OrderedDict()
        self._listed: tuple[float, list[Model]] | None = None
        self._unreadable: dict[str, str] = {}  # why an adapter is not listed, by name; logged once for each reason
        # Loading takes long, so it has threads of its own: requests for ready adapters do not wait for it.
        self._threads = ThreadPoolExecutor(2, thread_name_prefix="finetune-loading")

    def name_of(self, model: str) -> str | None:
        """Return the canonical reference in a request's ``model``; None for the plain base.

        This does not ask the registry.

        Raises:
            RequestError: ``model`` is not a reference, or this server does not serve that adapter.
        """
        if model == BASE:
            return None
        try:
            ref = AdapterRef.parse(model)
        except AdapterReferenceError as error:
            raise _no_such(f"{error} The name of the plain base is {BASE!r}.") from None
        if str(ref) not in self._refs and not self._is_allowed(ref):
            raise _no_such(
                f"`model` must name an adapter that this server serves, got {brief(model)}. GET /v1/models lists them. "
                "The operator adds adapters on the command line or with --allow."
            )
        return str(ref)

    async def ready(self, name: str) -> None:
        """Wait until an adapter has been loaded once.

        Requests for the same adapter share one load. A failed load is not tried again for ``known_seconds``.

        Args:
            name: a name that ``name_of`` returned.

        Raises:
            RequestError: the adapter cannot be loaded.
        """
        if name in self._ready:
            return
        refused = self._refused.get(name)
        if refused is not None:
            if self._clock() - refused[0] < self._known_seconds:
                raise refused[1].with_traceback(None)
            del self._refused[name]
        if name not in self._loading:
            if len(self._loading) >= _MOST_LOADING:
                raise RequestError(
                    f"The server already loads {_MOST_LOADING} adapters, so {name} must wait. Try again in 2 seconds.",
                    status=429,
                    code="loading",
                    param="model",
                    retry_after=2,
                )
            loading = self._loading[name] = asyncio.ensure_future(self._load(name))
            # It reads the error, because perhaps no request still waits for it.
            loading.add_done_callback(lambda done: done.cancelled() or done.exception())
        await asyncio.shield(self._loading[name])  # other requests may wait for it too

    async def models(self) -> list[Model]:
        """Return the catalog: the base, the adapters that are ready, and others of the registry that are allowed."""
        if self._listed is None or self._clock() - self._listed[0] >= self._known_seconds:
            found = await asyncio.get_running_loop().run_in_executor(self._threads, self._list)
            self._listed = self._clock(), found
        return self._listed[1]

    def is_ready(self, name: str) -> bool:
        """Return True if an adapter has been loaded once."""
        return name in self._ready

    def close(self) -> None:
        """End the threads, without waiting for an adapter that is being loaded."""
        self._threads.shutdown(wait=False, cancel_futures=True)

    async def _load(self, name: str) -> None:
        try:
            await asyncio.get_running_loop().run_in_executor(self._threads, self._switcher.add, name)
            self._ready.add(name)
        except Exception as error:
            refusal = to_request_error(error)
            self._refused[name] = self._clock(), refusal
            if len(self._refused) > _MOST_REFUSED:
                self._refused.popitem(last=False)
            raise refusal from None
        finally:
            del self._loading[name]

    def _is_allowed(self, ref: AdapterRef) -> bool:
        return any(fnmatchcase(str(ref) if "@" in pattern else ref.full_name, pattern) for pattern in self._allow)

    def _list(self) -> list[Model]:
        """Return the models by name; adapters that the registry cannot read are left out, and logged."""
        created = {BASE: 0, **dict.fromkeys(self._ready, 0)}
        created |= {
            one.ref: _seconds(one.manifest.created) for one in self._switcher.loaded_adapters if one.ref in created
        }
        for version, aliases in self._published():
            for alias in aliases:
                ref = AdapterRef(namespace=version.namespace, name=version.name, alias=alias)
                if self._is_allowed(ref):
                    created.setdefault(str(ref), _seconds(version.time))
        return [Model(id=name, created=created[name], owned_by=name.partition("/")[0]) for name in sorted(created)]

    def _published(self) -> Iterator[tuple[Version, Iterable[str]]]:
        """Yield the latest version of each adapter that can be read, and the aliases of the adapter."""
        registry = self._switcher.registry
        if registry is None or not self._allow:
            return
        unreadable: dict[str, str] = {}

        def note(name: str, error: FinetuneError) -> None:
            unreadable[name] = why = plain(str(error), 1000)
            if self._unreadable.get(name) != why:
                _log.error("%s cannot be read and is not listed: %s", name, why)

        try:
            versions = registry.list(onerror=note)
        except FinetuneError as error:
            note("the registry", error)
            versions = []
        for version in versions:
            try:
                yield version, registry.aliases(version.full_name)
            except FinetuneError as error:
                note(version.full_name, error)
        self._unreadable = unreadable


def _seconds(text: str) -> int:
    return int(datetime.fromisoformat(text).timestamp())


def _no_such(message: str) -> RequestError:
    return RequestError(message, status=404, code="model_not_found", param="model")
