import itertools
import random
import uuid

import pytest

from finetune.adapters.manifest import canonical_json, sha256_hex
from finetune.errors import ConflictError, IntegrityError, RegistryError, StoreError
from finetune.registry.log import commits
from finetune.registry.log import log as log_module
from finetune.registry.log.commits import Commit, current_actor, log_key, split_log_key
from finetune.registry.log.links import check_link
from finetune.registry.log.log import Log, list_logs
from finetune.registry.storage.local import LocalStore
from finetune.registry.storage.store import AlreadyExists
from tests.registry.faulty import Interfering

pytestmark = pytest.mark.usefixtures("no_sync")


@pytest.fixture
def store(tmp_path):
    return LocalStore(tmp_path / "store")


@pytest.fixture
def log(store):
    return Log(store, "medical", "brain")


def publishing(content: str = "x", txn: str | None = None):
    txn = txn or uuid.uuid4().hex

    def make(head):
        version = head.version + 1 if head else 1
        return Commit.after(
            head,
            txn=txn,
            op="publish",
            version=version,
            manifest=sha256_hex(content.encode()),
            aliases={**(head.aliases if head else {}), "latest": version},
            summary={"method": "lora"},
            expect={},
        )

    return make


def aliasing(alias: str, version: int):
    txn = uuid.uuid4().hex
    return lambda head: Commit.after(head, txn=txn, op="alias", aliases={**head.aliases, alias: version})


asked: list[str] = []


def note(verb, key):
    asked.append(verb)


def test_an_empty_log_has_no_head(log):
    assert log.head() is None
    assert list_logs(log.store) == {}


def test_entries_are_a_dense_chain(log):
    written = [log.append(publishing(str(n))) for n in range(5)]
    assert [c.seq for c in written] == [c.version for c in written] == [1, 2, 3, 4, 5]
    assert list(log.entries(log.head())) == written
    for entry, previous in zip(written, [None, *written], strict=False):
        assert check_link(entry, previous) == []
    raw = (log.store.root / "names/medical/brain/log/000000000003.json").read_bytes()
    assert raw == written[2].to_bytes() == canonical_json(written[2].model_dump() | {"checksum": written[2].checksum})
    assert written[3].prev == sha256_hex(raw)
    assert list_logs(log.store) == {("medical", "brain"): [1, 2, 3, 4, 5]}


def test_the_head_is_found_from_every_starting_point(store, log):
    for length in range(1, 24):
        newest = log.append(publishing())
        for known in range(length + 1):
            reader = Log(Interfering(store, before=note), "medical", "brain")
            reader.known = known
            asked.clear()
            assert reader.head() == newest
            assert reader.known == length
            assert set(asked) == {"get"}


def test_an_entry_that_was_seen_and_is_gone_is_an_error(log):
    log.append(publishing())
    log.append(publishing())
    log.store.delete(log.key(2))
    with pytest.raises(
        IntegrityError, match="000000000002.json: this log entry must exist, because it was read before, and is gone"
    ):
        log.head()


def test_versions_are_found_among_aliases(log):
    rng, versions = random.Random(7), {}
    for _ in range(60):
        head = log.head()
        if head is None or rng.random() < 0.4:
            entry = log.append(publishing(str(len(versions) % 5)))
            versions[entry.version] = entry
        else:
            log.append(aliasing("prod", rng.randint(1, head.version)))
    head = log.head()
    assert len(versions) == head.version > 10
    for number, entry in versions.items():
        assert log.find_version(number, head) == entry
        newest = max(n for n, e in versions.items() if e.manifest == entry.manifest)
        assert log.find_digest(entry.manifest, head) == versions[newest]
        assert log.find_txn(entry.txn, head) == entry
        assert log.find_txn(entry.txn, head, above=entry.seq) is None
    assert log.find_digest("0" * 64, head) is None


def test_the_head_alone_gives_its_own_version(store):
    Log(store, "medical", "brain").append(publishing())
    newest = Log(store, "medical", "brain").append(publishing())
    log = Log(Interfering(store, before=note), "medical", "brain")
    head = log.head()
    asked.clear()
    assert log.find_version(2, head) == newest
    assert asked == []


def test_a_second_writer_continues_from_the_first(store, log, monkeypatch):
    monkeypatch.setattr(log_module.time, "sleep", lambda seconds: None)
    others = itertools.count()

    def someone_else_first(verb, key):
        if verb == "put" and next(others) < 3:
            Log(store, "medical", "brain").append(publishing("theirs"))

    mine = Log(Interfering(store, before=someone_else_first), "medical", "brain")
    entry = mine.append(publishing("mine"))
    assert (entry.seq, entry.version, entry.manifest) == (4, 4, sha256_hex(b"mine"))
    everything = list(log.entries(log.head()))
    assert [c.manifest for c in everything].count(sha256_hex(b"theirs")) == 3
    for later, earlier in itertools.pairwise(reversed(everything)):
        assert check_link(later, earlier) == []


def test_pauses_grow_and_differ(store, monkeypatch):
    pauses = []
    monkeypatch.setattr(log_module, "MAX_ATTEMPTS", 12)
    monkeypatch.setattr(log_module.time, "sleep", pauses.append)
    monkeypatch.setattr(log_module.random, "uniform", lambda low, high: high)

    def always_first(verb, key):
        if verb == "put":
            Log(store, "medical", "brain").append(publishing())

    mine = Log(Interfering(store, before=always_first), "medical", "brain")
    with pytest.raises(ConflictError, match="log of medical/brain: other writers were first 12 times. Try again later"):
        mine.append(publishing())
    assert pauses[:3] == [0.002, 0.004, 0.008] and pauses[-1] == 0.5
    assert Log(store, "medical", "brain").head().seq == 12


def test_an_answer_lost_by_the_store_is_no_second_entry(store, log):
    """A client that asks again after a lost answer is told that its own entry exists."""

    def lose(verb, key):
        if verb == "put":
            raise AlreadyExists(key)

    entry = Log(Interfering(store, lose), "medical", "brain").append(publishing("mine"))
    assert list(log.entries(log.head())) == [entry]


def test_a_write_that_failed_after_it_was_done_is_seen_to_be_done(store, log):
    lost = []

    def lose(verb, key):
        if verb == "put" and not lost:
            lost.append(key)
            raise StoreError("timed out")

    entry = Log(Interfering(store, lose), "medical", "brain").append(publishing("mine"))
    assert lost and list(log.entries(log.head())) == [entry]


def test_a_store_that_never_confirms_a_write_is_not_trusted(store, log):
    def lose(verb, key):
        if verb == "put":
            raise StoreError("cannot sync the folder")

    with pytest.raises(StoreError, match="cannot sync the folder"):
        Log(Interfering(store, lose), "medical", "brain").append(publishing("mine"))
    assert log.head().seq == 1


def test_a_write_that_failed_while_someone_else_wrote_is_made_again_upon_theirs(store, log):
    failed = []

    def fail(verb, key):
        if verb == "put" and not failed:
            failed.append(key)
            Log(store, "medical", "brain").append(publishing("theirs"))
            raise StoreError("timed out")

    mine = Log(Interfering(store, before=fail), "medical", "brain")
    assert mine.append(publishing("mine")).version == 2
    assert [entry.manifest for entry in log.entries(log.head())] == [sha256_hex(b"theirs"), sha256_hex(b"mine")]


def test_a_write_that_failed_is_reported(store, log):
    def refuse(verb, key):
        if verb == "put":
            raise StoreError("the disk is full")

    with pytest.raises(StoreError, match="the disk is full"):
        Log(Interfering(store, before=refuse), "medical", "brain").append(publishing())
    assert log.head() is None


def test_an_entry_of_the_same_txn_by_someone_else_is_returned_as_it_stands(store, log):
    txn = uuid.uuid4().hex

    def same_try_elsewhere(verb, key):
        if verb == "put":
            Log(store, "medical", "brain").append(publishing("theirs", txn))

    mine = Log(Interfering(store, before=same_try_elsewhere), "medical", "brain")
    assert mine.append(publishing("mine", txn)).manifest == sha256_hex(b"theirs")
    assert log.head().seq == 1


def test_nothing_is_written_when_nothing_changes(log):
    entry = log.append(publishing())
    assert log.append(lambda head: head) == entry
    assert log.head().seq == 1


# Single entries.


def _parse(change=None, **fields):
    data = Commit.after(None, **_fields()).model_dump() | fields
    raw = canonical_json(data | {"checksum": sha256_hex(canonical_json(data))})
    return Commit.parse(change(raw) if change else raw, source="names/a/b/log/000000000001.json")


def _fields(**more):
    return {
        "txn": "0" * 32,
        "op": "publish",
        "version": 1,
        "manifest": "1" * 64,
        "aliases": {"latest": 1},
        "summary": {},
        "expect": {},
    } | more


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"seq": 0}, "seq: Input should be greater than or equal to 1"),
        ({"seq": "1"}, "seq: Input should be a valid integer"),
        ({"prev": "abc"}, "prev: String should match"),
        ({"txn": "mine"}, "txn: String should match"),
        ({"op": "delete"}, "op: Input should be 'publish', 'alias', 'rollback'"),
        ({"aliases": {}}, "aliases.latest: must be there, and is missing"),
        ({"aliases": {"latest": 1, "prod": 2}}, "aliases.prod: must be at most the newest version, 1, got 2"),
        ({"aliases": {"latest": 1, "17": 1}}, "aliases.17.*: String should match"),
        ({"expect": {"prod": -1}}, "expect.prod: Input should be greater than or equal to 0"),
        ({"actor": "a\x1b[31m"}, "actor: String should match"),
        ({"time": "yesterday"}, "time: String should match"),
        ({"color": 1}, "color: Extra inputs are not permitted"),
    ],
)
def test_an_entry_that_breaks_the_schema_is_refused(fields, message):
    with pytest.raises(IntegrityError, match=f"000000000001.json: not a valid log entry: .*{message}"):
        _parse(**fields)


def test_only_one_spelling_stands_for_an_entry():
    assert _parse().seq == 1
    with pytest.raises(IntegrityError, match="not in the canonical form"):
        _parse(lambda raw: raw.replace(b",", b", ", 1))
    with pytest.raises(IntegrityError, match="not in the canonical form"):
        _parse(lambda raw: raw.replace(b',"schema_version":3', b""))
    with pytest.raises(IntegrityError, match="a key must be unique, but 'seq' is given twice"):
        _parse(lambda raw: raw.replace(b'"seq":1', b'"seq":1,"seq":1'))
    with pytest.raises(IntegrityError, match="000000000001.json: not JSON"):
        _parse(lambda raw: raw[:-1])
    with pytest.raises(IntegrityError, match="must have at most 1048576 bytes"):
        _parse(summary={"x": "y" * commits.MAX_COMMIT_BYTES})


def test_a_newer_schema_asks_for_an_upgrade():
    with pytest.raises(RegistryError, match="`schema_version` must be at most 3, got 4. Upgrade finetune"):
        _parse(schema_version=4, op="delete", deleted=[1])


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"summary": {"x": float("nan")}}, "Out of range float values"),
        ({"summary": {"x": "\ud800"}}, "surrogates not allowed"),
        ({"summary": {"x": "y" * commits.MAX_COMMIT_BYTES}}, "the new entry must have at most 1048576 bytes"),
        ({"txn": ""}, "txn: String should match pattern"),
        (
            {"aliases": {"latest": 1} | {f"a{n}": 1 for n in range(1000)}},
            "aliases: Dictionary should have at most",
        ),
    ],
)
def test_what_no_log_can_hold_is_not_written(log, fields, message):
    with pytest.raises((RegistryError, IntegrityError), match=message):
        log.append(lambda head: Commit.after(head, **_fields(**fields)))
    assert log.head() is None


def test_an_entry_in_the_place_of_another_is_refused(log):
    log.append(publishing())
    raw = (log.store.root / log.key(1)).read_bytes()
    log.store.put(log.key(2), raw)
    with pytest.raises(IntegrityError, match="000000000002.json: its `seq` must be 2, got 1"):
        log.head()


def test_check_link_names_what_does_not_fit():
    first = Commit.after(None, **_fields())
    second = Commit.after(first, **_fields(version=2, aliases={"latest": 2}))
    moved = Commit.after(first, **_fields(op="alias", aliases={"latest": 1, "prod": 1}))
    assert check_link(second, first) == check_link(moved, first) == []
    changed = first.model_copy(update={"actor": "someone@else"})

    def problem(commit, previous):
        (only,) = check_link(commit, previous)
        return only

    assert "its `prev` must be the digest of the entry before it, and is not" in problem(second, changed)
    assert "its `prev` must be null, because it is the first" in problem(
        first.model_copy(update={"prev": "0" * 64}), None
    )
    assert "its `seq` must be 2, got 3" in problem(second.model_copy(update={"seq": 3}), first)
    skipped = second.model_copy(update={"version": 3, "aliases": {"latest": 3}})
    assert "it must publish version 2, got 3" in problem(skipped, first)
    other = moved.model_copy(update={"manifest": "2" * 64})
    assert "its op is alias, so its newest version must be that of the entry before it, and differs" in problem(
        other, first
    )
    assert "the op of the first entry must be publish, got alias" in problem(
        first.model_copy(update={"op": "alias"}), None
    )


def test_keys_of_entries():
    assert log_key("medical", "brain", 17) == "names/medical/brain/log/000000000017.json"
    assert split_log_key(log_key("medical", "brain", 17)) == ("medical", "brain", 17)
    for key in (
        "names/medical/brain/log/17.json",
        "names/medical/brain/log/000000000000.json",
        "names/medical/brain/000000000001.json",
        "names/Medical/brain/log/000000000001.json",
        "names/medical/con/log/000000000001.json",
        "blobs/medical/brain/log/000000000001.json",
    ):
        assert split_log_key(key) is None


def test_the_actor_is_printable_even_without_a_user(monkeypatch):
    monkeypatch.setattr(commits.getpass, "getuser", lambda: "eve\x1b[2J")
    monkeypatch.setattr(commits.socket, "gethostname", lambda: "host" * 200)
    assert current_actor().startswith("eve?[2J@host") and len(current_actor()) == 256

    def no_user():
        raise KeyError("uid 12345")

    monkeypatch.setattr(commits.getpass, "getuser", no_user)
    assert current_actor().startswith("unknown@host")
