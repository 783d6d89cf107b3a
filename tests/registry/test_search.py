"""Requests are counted: each is a round trip where the store is far away."""

import pytest

from benchmarks.registry import MOST_REQUESTS, NAME, CountingStore, count_cold, fill, make_log
from finetune.errors import IntegrityError, StoreError
from finetune.registry.log.commits import Commit, hint_key, log_key
from finetune.registry.log.hint import HINT_EVERY, MAX_PLACES, around, read_hint, write_hint
from finetune.registry.log.log import Log
from finetune.registry.log.search import find_newest
from finetune.registry.storage.memory import MemoryStore
from tests.registry.faulty import Interfering
from tests.registry.test_log import publishing

LENGTHS = [*range(1, 70), 100, 255, 256, 257, 1000, 9_999, 10_000, 16_384, 16_400, 16_401, 100_000, 1_000_000]


class Entries:
    """A log of some length, that counts what is asked of it."""

    def __init__(self, length: int, hint: int = 0):
        self.length, self.hint, self.asked = length, hint, 0

    def fetch(self, number: int) -> bytes | None:
        self.asked += 1
        assert number >= 1
        return b"%d" % number if number <= self.length else None

    def read_hint(self) -> int:
        self.asked += 1
        return self.hint

    def newest(self, known: int = 0) -> int:
        number, raw = find_newest(self.fetch, self.read_hint, known)
        assert raw == (None if number == known else b"%d" % number)
        return number


@pytest.mark.parametrize("length", LENGTHS)
def test_the_newest_is_found_whatever_is_known_and_hinted(length):
    wrong = [0, 1, length - 1, length + 1, length + 1000, 10**11]
    for hint in {length, length // HINT_EVERY * HINT_EVERY, length // 2, *wrong}:
        for known in {0, 1, length // 2, length - 1, length}:
            assert Entries(length, hint).newest(known) == length
    assert Entries(0).newest() == 0


def test_how_many_requests_it_takes():
    def requests(length, known=0, *, hinted=True):
        entries = Entries(length, length // HINT_EVERY * HINT_EVERY if hinted else 0)
        entries.newest(known)
        return entries.asked

    assert requests(0) == 1
    assert requests(1) == 3
    assert max(requests(length) for length in range(1, HINT_EVERY)) == 7
    assert max(requests(length) for length in LENGTHS) == 10
    assert requests(10_000) == 10
    assert requests(10_000, hinted=False) == 19
    assert max(requests(length, hinted=False) for length in LENGTHS if length <= 10_000) == 19
    assert requests(1_000_000, hinted=False) == 29
    assert {requests(length, known=length) for length in LENGTHS} == {1}


@pytest.fixture(scope="module")
def logs():
    return {"publish": make_log(10_000), "mixed": make_log(10_000, mixed=True)}


def _versions(log):
    newest = Commit.parse(log[-1], source="").version
    return sorted({1, 2, 17, newest // 3, newest // 2, newest - 1, newest, *range(1, newest, newest // 50)})


@pytest.mark.parametrize("what", ["publish", "mixed"])
def test_a_cold_resolve_among_10000_entries_takes_few_requests(logs, what):
    store = MemoryStore()
    fill(store, logs[what])
    refs = [NAME, f"{NAME}@prod", *(f"{NAME}@{version}" for version in _versions(logs[what]))]
    counts = [count_cold(store, ref)[0] for ref in refs]
    assert counts[0] == 11  # registry.json is one of them
    assert max(counts) <= (12 if what == "publish" else 17) < MOST_REQUESTS


def test_without_the_hint_it_takes_some_more(logs):
    store = MemoryStore()
    fill(store, logs["publish"], hint=False)
    assert count_cold(store, NAME)[0] == MOST_REQUESTS
    assert {count_cold(store, f"{NAME}@{version}")[0] for version in _versions(logs["publish"])[:-1]} == {21}


def test_a_resolve_does_not_depend_on_how_many_names_there_are(logs):
    few, many = MemoryStore(), MemoryStore()
    fill(few, logs["publish"][:5])
    for number in range(2000):
        fill(many, logs["publish"][:5], name=f"{NAME}-{number}")
    assert count_cold(few, NAME)[0] == count_cold(many, f"{NAME}-1234")[0] == 8


@pytest.mark.parametrize(
    ("what", "hint", "most", "mean"),
    [("publish", True, 1, 1), ("publish", False, 1, 1), ("mixed", True, 6, 2.2), ("mixed", False, 10, 4)],
)
def test_every_version_is_found_with_few_requests(logs, what, hint, most, mean):
    store = MemoryStore()
    fill(store, logs[what][:1000], hint=hint)
    log = Log(counting := CountingStore(store), *NAME.split("/"))
    head, counts = log.head(), []
    for version in range(1, head.version + 1):
        before = counting.requests
        found = log.find_version(version, head)
        assert (found.op, found.version) == ("publish", version)
        counts.append(counting.requests - before)
    assert max(counts) <= most
    assert sum(counts) / len(counts) <= mean


def test_a_version_that_the_log_lost_is_an_error(logs):
    store = MemoryStore()
    fill(store, logs["publish"][:20])
    head = Log(store, *NAME.split("/")).head()
    lost = Commit.parse(logs["publish"][6], source="7").model_copy(update={"op": "alias"}).to_bytes()
    store.put(log_key(*NAME.split("/"), 7), lost, mode="overwrite")
    with pytest.raises(
        IntegrityError, match="000000000007.json: this entry or an earlier one must publish version 7, and none does"
    ):
        Log(store, *NAME.split("/")).find_version(7, head)


# The hint.


def test_writers_leave_a_hint_now_and_then():
    store, touched = MemoryStore(), []
    log = Log(Interfering(store, after=lambda verb, key: touched.append((verb, key))), "medical", "brain")
    for _ in range(2 * HINT_EVERY + 1):
        log.append(publishing())
    key = hint_key("medical", "brain")
    assert [verb for verb, touched_key in touched if touched_key == key] == ["get", "put"] * 2
    with store.get(key) as file:
        assert file.read() == b"[[16,16],[32,32]]"
    assert read_hint(store, "medical", "brain") == [(16, 16), (32, 32)]


def test_a_hint_stays_small(logs):
    store = MemoryStore()
    fill(store, logs["publish"])
    places = read_hint(store, *NAME.split("/"))
    assert MAX_PLACES / 2 < len(places) <= MAX_PLACES
    assert places[-1] == (10_000, 10_000)
    assert {after[0] - before[0] for before, after in zip(places, places[1:], strict=False)} == {
        HINT_EVERY,
        2 * HINT_EVERY,
    }


def test_the_place_of_a_version_is_between_two_of_the_hint(logs):
    head = Commit.parse(logs["mixed"][99], source="")
    places = [(10, 3), (20, 3), (30, 9), (500, 400)]
    newest = (head.seq, head.version)
    assert around(places, 1, head) == ((0, 0), (10, 3))
    assert around(places, 4, head) == ((20, 3), (30, 9))
    assert around(places, 10, head) == ((30, 9), newest)
    assert around([], 10, head) == ((0, 0), newest)


@pytest.mark.parametrize(
    "hint",
    [
        *(b"", b"x", b"16", b"[]", b"[[16]]", b'["ab"]', b'{"16":16}', b"[[16.5,2]]", b"[[true,1]]", b"[[-5,1]]"),
        *(
            b"[[16,16],[16,16]]",
            b"[[32,16],[16,16]]",
            b"[[16,16],[32,15]]",
            b"[[16,39]]",
            b"[[16,2]]",
            b"[[2,1],[39,2]]",
        ),
        *(b"[[99,99]]", b"[[999999999999,1]]", b"[[1,999999999999]]", b"[[16,1],[39,39]]", b"[[1,1],[38,1]]"),
        *(b"[" * 9000, b"[" * 9000 + b"]" * 9000, b" " * 100_000, "[[٣,1]]".encode(), b"\xff"),
    ],
)
@pytest.mark.parametrize("what", ["publish", "mixed"])
def test_a_wrong_hint_costs_requests_and_nothing_else(logs, what, hint):
    store = MemoryStore()
    fill(store, logs[what][:40])
    store.put(hint_key(*NAME.split("/")), hint, mode="overwrite")
    log = Log(store, *NAME.split("/"))
    head = log.head()
    assert head.seq == 40
    for version in range(1, head.version + 1):
        assert log.find_version(version, head).version == version
    write_hint(store, *NAME.split("/"), head)
    assert read_hint(store, *NAME.split("/"))[-1] == (40, head.version)


def test_a_hint_that_cannot_be_written_is_no_error():
    def refuse(verb, key):
        if verb == "put" and key == hint_key("medical", "brain"):
            raise StoreError("read-only")

    log = Log(Interfering(MemoryStore(), before=refuse), "medical", "brain")
    for number in range(HINT_EVERY + 1):
        assert log.append(publishing()).seq == number + 1
