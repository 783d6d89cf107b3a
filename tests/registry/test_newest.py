"""Requests are counted: each is a round trip where the store is far away."""

import pytest

from benchmarks.registry import MOST_REQUESTS, NAME, CountingStore, count_cold, fill, make_log
from finetune.errors import IntegrityError, StoreError
from finetune.registry.commits import Commit, hint_key, log_key
from finetune.registry.log import Log
from finetune.registry.newest import HINT_EVERY, find_newest
from finetune.registry.stores.memory import MemoryStore
from tests.registry.faulty import Interfering
from tests.registry.forging import forged
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


@pytest.mark.parametrize("what", ["publish", "mixed"])
def test_a_cold_resolve_among_10000_entries_takes_few_requests(logs, what):
    store = MemoryStore()
    fill(store, logs[what])
    newest = Commit.parse(logs[what][-1], source="").version
    refs = [NAME, f"{NAME}@prod", *(f"{NAME}@{n}" for n in (1, 2, 17, newest // 3, newest // 2, newest - 1, newest))]
    counts = {ref: count_cold(store, ref)[0] for ref in refs}
    print(counts)
    assert max(counts.values()) <= MOST_REQUESTS
    assert counts[NAME] == 11  # registry.json is one of them
    store.delete(hint_key(*NAME.split("/")))
    assert count_cold(store, NAME)[0] == MOST_REQUESTS


def test_a_resolve_does_not_depend_on_how_many_names_there_are(logs):
    few, many = MemoryStore(), MemoryStore()
    fill(few, logs["publish"][:5])
    for number in range(2000):
        fill(many, logs["publish"][:5], name=f"{NAME}-{number}")
    assert count_cold(few, NAME)[0] == count_cold(many, f"{NAME}-1234")[0] == 8


def test_every_version_is_found_in_a_log_of_any_mixture(logs):
    for what, length in (("publish", 300), ("mixed", 300)):
        store = MemoryStore()
        fill(store, logs[what][:length])
        log = Log(counting := CountingStore(store), *NAME.split("/"))
        head = log.head()
        most = 0
        for version in range(1, head.version + 1):
            before = counting.requests
            found = log.find_version(version, head)
            assert (found.op, found.version) == ("publish", version)
            most = max(most, counting.requests - before)
        assert most <= (1 if what == "publish" else 10)


def test_a_version_that_the_log_lost_is_an_error(logs):
    store = MemoryStore()
    fill(store, logs["publish"][:20])
    head = Log(store, *NAME.split("/")).head()
    lost = forged(logs["publish"][6], b'"op":"publish"', b'"op":"alias"')
    store.put(log_key(*NAME.split("/"), 7), lost, mode="overwrite")
    with pytest.raises(IntegrityError, match="000000000007.json: version 7 should be published here or before, and is"):
        Log(store, *NAME.split("/")).find_version(7, head)


# The hint.


def test_writers_leave_a_hint_now_and_then():
    store, written = MemoryStore(), []
    log = Log(Interfering(store, after=lambda verb, key: written.append(key)), "medical", "brain")
    for _ in range(2 * HINT_EVERY + 1):
        log.append(publishing())
    key = hint_key("medical", "brain")
    assert written.count(key) == 2
    with store.get(key) as file:
        assert file.read() == b"32"


@pytest.mark.parametrize("hint", [b"", b"x", b"-5", b"0", b"99", b"999999999999", b"1" * 1000, "٣".encode(), b"\xff"])
def test_a_wrong_hint_costs_requests_and_nothing_else(logs, hint):
    store = MemoryStore()
    fill(store, logs["publish"][:40])
    store.put(hint_key(*NAME.split("/")), hint, mode="overwrite")
    assert Log(store, *NAME.split("/")).head().seq == 40


def test_a_hint_that_cannot_be_written_is_no_error():
    def refuse(verb, key):
        if verb == "put" and key == hint_key("medical", "brain"):
            raise StoreError("read-only")

    log = Log(Interfering(MemoryStore(), before=refuse), "medical", "brain")
    for number in range(HINT_EVERY + 1):
        assert log.append(publishing()).seq == number + 1
