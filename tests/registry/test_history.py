"""What a change costs does not depend on what happened before."""

import pytest

from benchmarks.registry_writes import write_history
from finetune.registry import AdapterRegistry
from finetune.registry.storage.local import LocalStore
from tests.registry.faulty import Interfering

pytestmark = pytest.mark.usefixtures("no_sync")

LENGTHS = {"team/short": 1, "team/long": 10_000}


@pytest.fixture(scope="module")
def location(tmp_path_factory):
    """A registry with a long log and a short one."""
    location = tmp_path_factory.mktemp("history") / "registry"
    for name, length in LENGTHS.items():
        write_history(LocalStore(location), name, length)
    return location


@pytest.fixture
def counted(location):
    """The registry, and the calls of its store: verb, kind of key, bytes written."""
    registry = AdapterRegistry(location)
    calls = []

    class Counting(Interfering):
        def put(self, key, data, *, mode="create"):
            data = data if isinstance(data, bytes) else b"".join(data)
            calls.append((f"{mode} {key.split('/')[0]}", len(data)))
            self.store.put(key, data, mode=mode)

    registry.store = Counting(registry.store, before=lambda verb, key: calls.append((f"{verb} {key.split('/')[0]}", 0)))
    registry.calls = calls
    return registry


def test_a_commit_upon_10_000_makes_the_calls_of_one_upon_the_first(counted, make_adapter):
    folders = {name: [make_adapter(name, seed=seed) for seed in range(2)] for name in LENGTHS}

    def change(name, number):
        version = counted.publish(folders[name][number], aliases=["prod"], txn=counted.new_txn(name)).version
        counted.alias(name, "test", version, expect=0 if number == 0 else version - 1)
        counted.yank(f"{name}@{version}", reason="x")
        counted.unyank(f"{name}@{version}")

    made = {}
    for name in LENGTHS:
        change(name, 0)  # who writes for the first time searches for the newest entry
        counted.calls.clear()
        change(name, 1)
        made[name] = list(counted.calls)
    short, long = made.values()
    assert [verb for verb, _ in short] == [verb for verb, _ in long]
    assert sum(verb == "create names" for verb, _ in long) == 4
    # The numbers in an entry have more digits: seq, version, and those that the aliases stand for.
    entries = [[size for verb, size in calls if verb == "create names"] for calls in (short, long)]
    assert all(0 <= b - a <= 7 * 4 for a, b in zip(*entries, strict=True)), entries
    assert max(entries[1]) < 2000


def test_a_first_read_makes_few_calls_more(counted, make_adapter):
    made = {}
    for name in LENGTHS:
        fresh = AdapterRegistry(counted.location)
        fresh.store = counted.store
        counted.calls.clear()
        fresh.publish(make_adapter(name))
        made[name] = len(counted.calls)
    assert made["team/long"] - made["team/short"] <= 40


def test_a_list_reads_as_much_of_a_long_log_as_of_a_short_one(counted):
    counted.list()
    counted.calls.clear()
    assert [v.full_name for v in counted.list()] == ["team/long", "team/short"]
    assert [verb for verb, _ in counted.calls if verb.startswith("get")] == ["get registry.json"]
