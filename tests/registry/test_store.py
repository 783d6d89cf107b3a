"""What every store promises, over each of them: a folder, memory, and real servers."""

import sys
import threading
from datetime import UTC, datetime, timedelta

import pytest

from finetune.errors import IntegrityError, StoreError
from finetune.registry.storage.location import open_store
from finetune.registry.storage.store import AlreadyExists, ObjectMeta, ObjectMissing, exists, is_key, read_all

KEY = "names/medical/brain/log/000000000001.json"


@pytest.fixture
def store(location):
    return open_store(location)


def _get(store, key):
    with store.get(key) as file:
        return file.read()


def _keys(store, prefix=""):
    return sorted(meta.key for meta in store.list(prefix))


def test_what_is_put_is_got(store):
    assert not exists(store, KEY)
    store.put(KEY, b"one")
    assert _get(store, KEY) == b"one"
    found = store.head(KEY)
    assert found == ObjectMeta(key=KEY, size=3, modified=found.modified)
    assert abs(datetime.now(UTC) - found.modified) < timedelta(minutes=5)
    assert exists(store, KEY)


def test_data_may_come_in_pieces(store):
    store.put("a/pieces", (bytes([n]) * 700_000 for n in range(4)))
    assert _get(store, "a/pieces") == b"".join(bytes([n]) * 700_000 for n in range(4))
    store.put("a/empty", iter(()))
    assert store.head("a/empty").size == 0


@pytest.mark.parametrize("mode", ["create", "overwrite"])
def test_large_data_comes_back_as_it_went(store, mode):
    pieces = [bytes([n]) * 1_000_003 for n in range(20)]
    store.put("a/large", iter(pieces), mode=mode)
    assert store.head("a/large").size == 20 * 1_000_003
    with store.get("a/large") as file:
        assert file.read(5) == b"\0" * 5
        assert file.read(1_000_000) == (b"\0" * 999_998 + b"\1\1")
        assert file.read() == b"".join(pieces)[1_000_005:]
        assert file.read(1) == b""
    assert _keys(store) == ["a/large"]


def test_an_object_has_the_time_when_it_was_written(store):
    second = timedelta(seconds=1)  # the unit of some servers, which have the clock of this machine here
    before = datetime.now(UTC) - second
    store.put(KEY, b"one")
    (listed,) = store.list("names")
    for about in (store.head(KEY), listed):
        assert before <= about.modified <= datetime.now(UTC) + second
        assert about.modified.utcoffset() == timedelta(0)


def test_what_is_open_is_read_whole_whatever_happens_to_its_name(store):
    store.put(KEY, b"one" * 1000)
    with store.get(KEY) as file:
        store.put(KEY, b"two" * 1000, mode="overwrite")
        assert file.read() == b"one" * 1000


def test_create_never_replaces(store):
    store.put(KEY, b"one")
    with pytest.raises(AlreadyExists, match="000000000001.json exists"):
        store.put(KEY, b"two", mode="create")
    with pytest.raises(AlreadyExists):
        store.put(KEY, b"one")
    assert _get(store, KEY) == b"one"


def test_overwrite_does(store):
    store.put(KEY, b"one", mode="overwrite")
    store.put(KEY, b"another", mode="overwrite")
    assert _get(store, KEY) == b"another"
    assert _keys(store) == [KEY]


def test_what_is_missing_is_signalled(store):
    store.put("a/b", b"")
    for key in ("a/c", "x/y/z"):
        with pytest.raises(ObjectMissing, match="is not there"):
            store.get(key)
        with pytest.raises(ObjectMissing, match="is not there"):
            store.head(key)


def test_list_takes_whole_parts_of_keys(store):
    assert _keys(store) == []
    assert _keys(store, "a") == []
    for key in ("a/one", "a/b/two", "ab/three", "four"):
        store.put(key, b"12345")
    assert _keys(store) == ["a/b/two", "a/one", "ab/three", "four"]
    assert _keys(store, "a") == _keys(store, "a/") == ["a/b/two", "a/one"]
    assert list(store.list("ab")) == [store.head("ab/three")]
    assert _keys(store, "nothing") == []


def test_delete_may_be_repeated(store):
    store.put(KEY, b"one")
    store.delete(KEY)
    store.delete(KEY)
    assert not exists(store, KEY)
    store.put(KEY, b"two")
    assert _get(store, KEY) == b"two"


@pytest.mark.parametrize("mode", ["create", "overwrite"])
def test_data_that_breaks_off_is_not_written(store, mode):
    if mode == "overwrite":
        store.put(KEY, b"old")

    def pieces():
        yield b"half"
        raise IntegrityError("the rest is wrong")

    with pytest.raises(IntegrityError, match="the rest is wrong"):
        store.put(KEY, pieces(), mode=mode)
    assert exists(store, KEY) == (mode == "overwrite")
    if mode == "overwrite":
        assert _get(store, KEY) == b"old"
    assert _keys(store) == ([KEY] if mode == "overwrite" else [])


@pytest.mark.parametrize(
    "key",
    ["", "/etc/passwd", "../x", "a/../../x", "a//b", "a/", "a/.hidden", "C:/x", "a\\b", "a/b\n", "a/\0", "ä"],
)
def test_keys_cannot_leave_the_store(store, key):
    for call in (
        lambda: store.put(key, b"x"),
        lambda: store.put(key, b"x", mode="overwrite"),
        lambda: store.get(key),
        lambda: store.head(key),
        lambda: store.delete(key),
    ):
        with pytest.raises(StoreError, match="a key must consist of parts of a-z"):
            call()
    assert not is_key(key)


def test_who_is_overtaken_while_writing_loses(store):
    def pieces():
        yield b"mi"
        store.put(KEY, b"theirs")
        yield b"ne"

    with pytest.raises(AlreadyExists):
        store.put(KEY, pieces())
    assert _get(store, KEY) == b"theirs"
    assert _keys(store) == [KEY]


def test_of_many_creators_one_succeeds(store, no_sync):
    rounds, workers = 40, 6
    start, won, lost = threading.Barrier(workers), [], []

    def create(number):
        for turn in range(rounds):
            start.wait()
            try:
                store.put(f"turn/{turn}", str(number).encode() * 1000)
                won.append((turn, number))
            except AlreadyExists:
                lost.append(turn)

    threads = [threading.Thread(target=create, args=(n,)) for n in range(workers)]
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    finally:
        sys.setswitchinterval(interval)
    assert sorted(turn for turn, _ in won) == list(range(rounds))
    assert len(lost) == rounds * (workers - 1)
    for turn, number in won:
        assert _get(store, f"turn/{turn}") == str(number).encode() * 1000


def test_small_objects_are_read_with_a_limit(store):
    store.put("a/b", b"12345")
    assert read_all(store, "a/b", max_bytes=5) == b"12345"
    with pytest.raises(IntegrityError, match="a/b: must have at most 4 bytes, got more"):
        read_all(store, "a/b", max_bytes=4)
