"""The benchmark of the registry's requests, run small."""

import json

from benchmarks.registry import LISTED_AT_ONCE, CountingStore, main
from finetune.registry.storage.memory import MemoryStore


def test_it_counts_what_it_measures(tmp_path, capsys):
    options = ["--latency", "0", "--tries", "1", "--commits", "100", "--names", "100"]
    assert main([*options, "--json", str(tmp_path / "figures.json")]) == 0
    found = json.loads((tmp_path / "figures.json").read_text())["details"]["resolves"]
    assert {(one["names"], one["commits"]) for one in found} == {(1, 1), (1, 10), (1, 100), (100, 10)}
    assert {one["requests"] for one in found if one["commits"] == 1} == {4}
    by_names = {
        one["requests"] for one in found if one["commits"] == 10 and one["ref"] in ("team/adapter", "team/adapter-0")
    }
    assert by_names == {7}, "as many with 100 names as with one"
    assert "most requests in a log of 10,000 entries" in capsys.readouterr().out


def test_a_listing_is_a_request_for_each_page():
    store = MemoryStore()
    counting = CountingStore(store)
    for number, requests in ((0, 1), (1, 1), (LISTED_AT_ONCE, 1), (LISTED_AT_ONCE + 1, 2)):
        for key in range(number):
            store.put(f"a/{key}", b"", mode="overwrite")
        counting.requests = 0
        assert len(list(counting.list("a"))) == number
        assert counting.requests == requests
