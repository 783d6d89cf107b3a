"""The number of requests that a registry makes to its store, and their time at a given latency.

python -m benchmarks.registry --json registry.json      takes about a minute on an idle CPU core
"""

from __future__ import annotations

import argparse
import json
import platform
import random
import statistics
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO, Literal

from finetune.adapters.manifest import sha256_hex
from finetune.registry import AdapterRegistry
from finetune.registry.log.commits import Commit, log_key
from finetune.registry.log.hint import HINT_EVERY, write_hint
from finetune.registry.storage.location import is_registry
from finetune.registry.storage.memory import MemoryStore

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from finetune.registry.storage.store import ObjectMeta, Store

NAME = "team/adapter"
LISTED_AT_ONCE = 1000  # keys that a request to S3 or Google Cloud Storage lists
MOST_REQUESTS = 20  # wanted of a cold resolve in a log of 10,000 entries
SUMMARY = {"base": {"model_type": "toy"}, "task": "vqa", "metrics": {"test": {"exact_match": 0.5}}}


class CountingStore:
    """A store that counts its requests, each of which takes ``latency`` seconds more than the store itself."""

    def __init__(self, store: Store, *, latency: float = 0.0) -> None:
        self.store, self.latency, self.requests = store, latency, 0

    def _count(self) -> None:
        self.requests += 1
        if self.latency:
            time.sleep(self.latency)

    def put(self, key: str, data: bytes | Iterable[bytes], *, mode: Literal["create", "overwrite"] = "create") -> None:
        """One request."""
        self._count()
        self.store.put(key, data, mode=mode)

    def get(self, key: str) -> BinaryIO:
        """One request."""
        self._count()
        return self.store.get(key)

    def head(self, key: str) -> ObjectMeta:
        """One request."""
        self._count()
        return self.store.head(key)

    def list(self, prefix: str = "") -> Iterator[ObjectMeta]:
        """A request for each ``LISTED_AT_ONCE`` keys, and one for nothing."""
        number = 0
        for number, meta in enumerate(self.store.list(prefix), start=1):
            if number % LISTED_AT_ONCE == 1:
                self._count()
            yield meta
        if not number:
            self._count()

    def delete(self, key: str) -> None:
        """One request."""
        self._count()
        self.store.delete(key)


@dataclass(frozen=True, kw_only=True)
class Resolve:
    """The cost of resolving a reference, for a registry that was just opened.

    Attributes:
        names: the number of names in the registry.
        commits: the number of entries in the log of each name.
        log: the type of its entries: ``publish``, or ``mixed`` with moves of aliases too.
        hint: whether the writers' hint exists.
        ref: the reference that is resolved.
        requests: the number of requests to the store.
        seconds: the median of several tries.
    """

    names: int
    commits: int
    log: str
    hint: bool
    ref: str
    requests: int
    seconds: float


def make_log(num_commits: int, *, mixed: bool = False) -> list[bytes]:
    """Return the entries of a log, from the first, made as the registry makes them.

    Args:
        num_commits: the number of entries.
        mixed: whether each entry after the first is, at random, a publish or a move of ``prod`` back.
    """
    rng, head, raw = random.Random(0), None, []
    for number in range(1, num_commits + 1):
        if head is None or not mixed or rng.random() < 0.5:
            version = 1 if head is None else head.version + 1
            manifest = sha256_hex(b"%d" % number)
            aliases = {"prod": version} if head is None else head.aliases
            changes = {
                "op": "publish",
                "version": version,
                "manifest": manifest,
                "summary": SUMMARY,
                "aliases": aliases,
            }
        else:
            moved = head.aliases | {"prod": rng.randint(max(1, head.version - 100), head.version)}
            changes = {"op": "alias", "aliases": moved}
        head = Commit.after(head, txn=f"{number:032x}", **changes)
        raw.append(head.to_bytes())
    return raw


def fill(store: Store, log: list[bytes], *, name: str = NAME, hint: bool = True) -> None:
    """Put a log into a store under a name, with the hint that its writers would have left, and make it a registry."""
    is_registry(store, create=True)
    namespace, word = name.split("/")
    for seq, raw in enumerate(log, start=1):
        store.put(log_key(namespace, word, seq), raw)
        if hint and seq % HINT_EVERY == 0:
            write_hint(store, namespace, word, Commit.parse(raw, source=NAME))


def count_cold(store: Store, ref: str, *, latency: float = 0.0) -> tuple[int, float]:
    """Return the number of requests, and the seconds, that a newly opened registry takes to resolve a reference."""
    registry = AdapterRegistry("memory://")
    registry.store = counting = CountingStore(store, latency=latency)
    begun = time.perf_counter()
    registry.resolve(ref)
    return counting.requests, time.perf_counter() - begun


def main(arguments: list[str] | None = None) -> int:
    """Measure, print a table and write the figures."""
    options = _parse(arguments)
    found: list[Resolve] = []
    for what in ("publish", "mixed"):
        log = make_log(options.commits, mixed=what == "mixed")
        for length in [n for n in (1, 10, 100, 1000, 10_000, 100_000) if n <= options.commits]:
            for hint in (True, False):
                store = MemoryStore()
                fill(store, log[:length], hint=hint)
                refs = [NAME, f"{NAME}@prod", f"{NAME}@{min(17, Commit.parse(log[length - 1], source='').version)}"]
                found += [_measure(store, ref, 1, length, what, hint=hint, options=options) for ref in refs]
    log = make_log(10)
    for names in [n for n in (1, 100, 10_000, 100_000) if n <= options.names]:
        store = MemoryStore()
        for number in range(names):
            fill(store, log, name=f"team/adapter-{number}")
        found.append(_measure(store, "team/adapter-0", names, 10, "publish", hint=True, options=options))
    print(f"{'names':>7} {'commits':>8} {'log':8} {'hint':5} {'ref':20} {'requests':>8} {'ms':>9}")
    for one in found:
        print(
            f"{one.names:7} {one.commits:8} {one.log:8} {'yes' if one.hint else 'no':5} {one.ref:20} "
            f"{one.requests:8} {one.seconds * 1e3:9.1f}"
        )
    most = max((one.requests for one in found if one.commits == 10_000 and one.hint), default=0)
    print(f"most requests in a log of 10,000 entries: {most}, wanted at most {MOST_REQUESTS}")
    if options.json:
        details = {
            "date": time.strftime("%Y-%m-%d"),
            "machine": f"{platform.machine()}, Python {platform.python_version()}",
            "latency_ms": options.latency,
            "resolves": [asdict(one) for one in found],
        }
        text = json.dumps({"cold_resolve_requests_10000": most, "details": details}, indent=1)
        options.json.write_text(text + "\n", encoding="utf-8")
    return 0


def _measure(
    store: Store, ref: str, names: int, commits: int, log: str, *, hint: bool, options: argparse.Namespace
) -> Resolve:
    tries = [count_cold(store, ref, latency=options.latency / 1e3) for _ in range(options.tries)]
    (requests,) = {requests for requests, _ in tries}
    seconds = statistics.median(seconds for _, seconds in tries)
    return Resolve(names=names, commits=commits, log=log, hint=hint, ref=ref, requests=requests, seconds=seconds)


def _parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.registry", description=__doc__.splitlines()[0])
    parser.add_argument("--json", type=Path, metavar="FILE", help="file to write the figures to")
    parser.add_argument("--latency", type=float, default=20.0, help="latency of a request, in milliseconds (20)")
    parser.add_argument("--commits", type=int, default=10_000, help="entries of the longest log (10000)")
    parser.add_argument("--names", type=int, default=100_000, help="names in the largest registry (100000)")
    parser.add_argument("--tries", type=int, default=5, help="tries of each resolve; the median counts (5)")
    return parser.parse_args(arguments)


if __name__ == "__main__":
    sys.exit(main())
