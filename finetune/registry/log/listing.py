"""The list of all versions of adapters, and the filter by base, task and metrics."""

import warnings
from collections.abc import Callable, Iterable
from typing import Any

from finetune.adapters.reference import LATEST, AdapterRef
from finetune.errors import FinetuneError, plain
from finetune.metrics.names import named_values
from finetune.registry.log.commits import Commit
from finetune.registry.log.conditions import Condition
from finetune.registry.log.index import OnError
from finetune.registry.log.log import list_logs
from finetune.registry.log.versions import Version
from finetune.registry.storage.store import Store, spares_others


def every_version(
    store: Store, namespace: str | None, log_of: Callable[[str], list[Commit]], onerror: OnError
) -> list[Version]:
    """Return every version of every adapter, by name, the oldest of a name first.

    Args:
        store: the store of the registry.
        namespace: the namespace to list; None for all.
        log_of: the function that reads the entries of an adapter, given its name.
        onerror: called with each adapter that cannot be read and is left out, and with the error.
    """
    versions: list[Version] = []
    for space, name in list_logs(store, namespace):
        ref = AdapterRef(namespace=space, name=name, alias=LATEST)
        try:
            entries = log_of(ref.full_name)
        except FinetuneError as error:
            if not spares_others(error):
                raise
            onerror(ref.full_name, error)
            continue
        versions.extend(Version.of(ref, entry, entries[-1]) for entry in entries if entry.op == "publish")
    return versions


def warn_of_unreadable(name: str, error: FinetuneError) -> None:
    """Warn the caller of ``list`` about an adapter that is left out."""
    warnings.warn(f"{name} cannot be read and is not listed: {plain(str(error), 1000)}", UserWarning, stacklevel=4)


def wanted(versions: Iterable[Version], *, base: str | None, task: str | None, metrics: Iterable[str]) -> list[Version]:
    """Return the versions whose summary meets the conditions.

    Args:
        versions: the versions to filter.
        base: the hub id of the base, or the beginning of its digest in hexadecimal; None for any.
        task: the name of the task; None for any.
        metrics: conditions on the metrics, which must all hold.

    Raises:
        ConditionError: one of ``metrics`` is not a condition.
    """
    conditions = [Condition.parse(text) for text in metrics]
    return [
        version
        for version in versions
        if (base is None or _is_base(version.summary, base))
        and (task is None or version.summary.get("task") == task)
        and all(condition.holds(named_values(version.summary.get("metrics"))) for condition in conditions)
    ]


def _is_base(summary: dict[str, Any], base: str) -> bool:
    digest = base.removeprefix("sha256:")
    return base == summary.get("base_id") or (digest != "" and str(summary.get("base")).startswith(digest))
