"""Replay: a state that was true once is refused by who has seen a newer one, whatever the store says."""

import errno
import multiprocessing
import os
import shutil
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import pytest

from finetune.adapters.manifest import sha256_hex
from finetune.adapters.reference import AdapterRef
from finetune.errors import NotFoundError, StoreError, TrustError
from finetune.registry import AdapterRegistry, verify
from finetune.registry.trust.rollback_protection import SeenEntries, default_seen
from tests.registry.signed import NAME, entry_path, key, policy, read_entry, rechain, signed_by, unsigned, write_entry

pytestmark = pytest.mark.usefixtures("no_sync")

A, B = sha256_hex(b"a"), sha256_hex(b"b")


def reader(registry, signatures="require") -> AdapterRegistry:
    """A new process of the same reader."""
    return AdapterRegistry(registry.location, trust=policy(signatures))


@pytest.fixture
def alice(registry, make_adapter) -> AdapterRegistry:
    """Who publishes; two versions, of which prod is the first, and then the second."""
    alice = AdapterRegistry(registry.location, signer=key("alice"))
    alice.publish(make_adapter(seed=1), aliases=["prod"])
    alice.publish(make_adapter(seed=2))
    alice.alias(NAME, "prod", 2)
    return alice


def marks() -> list[str]:
    return sorted(path.name for path in default_seen().rglob("*") if path.is_file())


def test_the_newest_entry_is_remembered_and_only_that(alice):
    assert reader(alice).resolve(f"{NAME}@prod").version == 2
    assert marks() == [f"000000000003-{read_entry(alice.location, 3).digest}"]
    alice.alias(NAME, "test", 1)
    reader(alice).resolve(NAME)
    assert marks() == [f"000000000004-{read_entry(alice.location, 4).digest}"]


def test_nothing_is_remembered_where_signatures_are_off(alice):
    reader(alice, "off").pull(NAME)
    AdapterRegistry(alice.location).resolve(NAME)
    assert not default_seen().exists()


def test_what_is_not_signed_is_not_remembered(alice):
    genuine = entry_path(alice.location, 3).read_bytes()
    write_entry(alice.location, unsigned(read_entry(alice.location, 3)))
    with pytest.warns(UserWarning, match="it is not signed"):
        reader(alice, "warn").resolve(NAME)
    assert marks() == []
    entry_path(alice.location, 3).write_bytes(genuine)
    assert reader(alice).resolve(f"{NAME}@prod").version == 2


def test_a_writer_remembers_nothing_that_it_could_not_sign(registry, make_adapter):
    AdapterRegistry(registry.location, trust=policy("warn")).publish(make_adapter())
    assert marks() == []


def test_a_log_that_was_cut_is_refused(alice):
    reader(alice).resolve(NAME)
    digest = read_entry(alice.location, 3).digest
    entry_path(alice.location, 3).unlink()
    old = (
        f"{NAME} in {alice.location}: its newest entry is 2, but entry 3 .sha256:{digest}. was seen here before. The "
        f"registry never deletes an entry, so this is an older state of the log. If that is expected, .*"
        f"`finetune registry forget {NAME}`"
    )
    for _ in range(2):
        with pytest.raises(TrustError, match=old):
            reader(alice).resolve(f"{NAME}@prod")
    (problem,) = verify(reader(alice)).problems
    assert problem.startswith("names/medical/brain-mri/log/000000000002.json: its newest entry is 2, but entry 3")
    with pytest.warns(UserWarning, match=old):
        assert reader(alice, "warn").resolve(f"{NAME}@prod").version == 1, "as it was once"
    assert reader(alice, "off").resolve(f"{NAME}@prod").version == 1


def test_a_log_that_was_cut_takes_no_entry(alice, make_adapter):
    writer = AdapterRegistry(alice.location, signer=key("alice"), trust=policy())
    writer.alias(NAME, "test", 1)
    shutil.rmtree(entry_path(alice.location, 1).parent)
    again = AdapterRegistry(alice.location, signer=key("alice"), trust=policy())
    with pytest.raises(TrustError, match="its newest entry is gone, but entry 4 .* was seen here before"):
        again.publish(make_adapter(seed=3))
    with pytest.raises(TrustError, match="its newest entry is gone"):
        reader(alice).resolve(NAME)
    with pytest.raises(NotFoundError):
        AdapterRegistry(alice.location).resolve(NAME)


def test_what_a_writer_wrote_it_has_seen(registry, make_adapter):
    AdapterRegistry(registry.location, signer=key("alice"), trust=policy()).publish(make_adapter(seed=1))
    entry_path(registry.location, 1).unlink()
    with pytest.raises(TrustError, match="its newest entry is gone, but entry 1"):
        reader(registry).resolve(NAME)


@pytest.mark.parametrize("more", [0, 1, 2])
def test_another_log_in_its_place_is_refused(alice, tmp_path, more):
    """Signed by the same key, as by a second writer who never saw the first: entry 3 differs, whatever follows it."""
    other = tmp_path / "other"
    shutil.copytree(alice.location, other)
    reader(alice).resolve(NAME)
    entry_path(other, 3).unlink()
    second = AdapterRegistry(other, signer=key("alice"))
    second.alias(NAME, "test", 1)
    for number in range(more):
        second.alias(NAME, f"more{number}", 1)
    assert AdapterRegistry(other, trust=policy()).resolve(f"{NAME}@prod").version == 1, "nothing else is wrong with it"
    seen, now = read_entry(alice.location, 3).digest, read_entry(other, 3).digest
    assert seen != now
    shutil.rmtree(alice.location)
    shutil.move(other, alice.location)
    message = f"its entry 3 is sha256:{now}, but sha256:{seen} was seen here before, so this is another log"
    with pytest.raises(TrustError, match=message):
        reader(alice).resolve(f"{NAME}@prod")
    assert any(message in problem for problem in verify(reader(alice)).problems)


def test_another_id_of_the_registry_does_not_help(alice):
    reader(alice).resolve(NAME)
    Path(alice.location, "registry.json").write_text('{"format":1,"uuid":"6f1c2b5e-0000-4000-8000-000000000000"}')
    entry_path(alice.location, 3).unlink()
    with pytest.raises(TrustError, match="its newest entry is 2, but entry 3"):
        reader(alice).resolve(NAME)


def test_the_memory_is_of_a_place_however_it_is_spelled(alice, tmp_path, monkeypatch):
    reader(alice).resolve(NAME)
    old = tmp_path / "mirror"
    shutil.copytree(alice.location, old)
    entry_path(old, 3).unlink()
    assert AdapterRegistry(old, trust=policy()).resolve(f"{NAME}@prod").version == 1, "a mirror may be behind"
    entry_path(alice.location, 3).unlink()
    os.symlink(alice.location, tmp_path / "link")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "x").mkdir()
    for spelled in ("registry", "./registry/", "link", str(tmp_path / "x" / ".." / "registry")):
        with pytest.raises(TrustError, match="was seen here before"):
            AdapterRegistry(spelled, trust=policy()).resolve(NAME)


def test_a_log_signed_anew_is_another_one(alice):
    reader(alice).resolve(NAME)
    rechain(alice.location, signed_by("carol"))
    both = policy(keys=("alice", "carol"))
    with pytest.raises(TrustError, match="so this is another log"):
        AdapterRegistry(alice.location, trust=both).resolve(NAME)


def test_a_registry_put_back_on_purpose_is_forgotten_first(alice):
    reader(alice).resolve(NAME)
    entry_path(alice.location, 3).unlink()
    assert reader(alice).guard.seen.forget(NAME)
    assert not reader(alice).guard.seen.forget(NAME)
    assert reader(alice).resolve(f"{NAME}@prod").version == 1


def test_an_entry_that_was_seen_and_is_gone_behind_others(alice):
    reader(alice).resolve(NAME)
    for alias in ("a", "b"):
        alice.alias(NAME, alias, 1)
    entry_path(alice.location, 3).unlink()
    again = reader(alice)
    again._log(AdapterRef.parse(NAME)).known = 5  # so that the reader does not miss entry 3
    with pytest.raises(TrustError, match="its entry 3 was seen here before, and is gone"):
        again.resolve(NAME)


# The memory itself.


def test_no_process_takes_away_what_another_has_seen(tmp_path, monkeypatch):
    mine, others = SeenEntries(str(tmp_path)), SeenEntries(str(tmp_path))
    listdir = os.listdir

    def meanwhile(folder):
        monkeypatch.setattr(os, "listdir", listdir)
        others.remember(NAME, 6, B)
        return listdir(folder)

    mine.remember(NAME, 4, A)
    monkeypatch.setattr(os, "listdir", meanwhile)
    mine.remember(NAME, 5, A)
    assert mine.newest(NAME) == others.newest(NAME) == (6, B)
    others.remember(NAME, 7, A)
    assert marks() == [f"000000000007-{A}"]


def test_two_processes_that_saw_different_entries(tmp_path):
    seen = SeenEntries(str(tmp_path))
    seen.remember(NAME, 5, A)
    seen.remember(NAME, 5, B)
    with pytest.raises(
        TrustError, match=f"{NAME}: two different entries 5 were seen .*split in two. Ask the administrator"
    ):
        seen.newest(NAME)


def test_a_damaged_memory_is_no_empty_one(alice):
    reader(alice).resolve(NAME)
    (mark,) = (path for path in default_seen().rglob("*") if path.is_file())
    mark.rename(mark.with_name("notes.txt"))
    damaged = (
        f"after entries, got 'notes.txt'. The memory of {NAME} is damaged. Ask .*"
        f"`finetune registry forget {NAME}` to begin"
    )
    with pytest.raises(TrustError, match=damaged):
        reader(alice).resolve(NAME)
    with pytest.warns(UserWarning, match=damaged):
        reader(alice, "warn").resolve(NAME)
    reader(alice).guard.seen.forget(NAME)
    assert reader(alice).resolve(NAME).version == 2


def test_a_memory_that_cannot_be_written(alice, monkeypatch):
    def refuse(*args, **kwargs):
        raise OSError(errno.EROFS, os.strerror(errno.EROFS))

    monkeypatch.setattr(Path, "touch", refuse)
    message = r"cannot write .*/seen/.*: Read-only file system. .*choose another folder \(FINETUNE_SEEN\)"
    with pytest.raises(StoreError, match=message):
        reader(alice).resolve(NAME)
    with pytest.warns(UserWarning, match=message):
        assert reader(alice, "warn").resolve(NAME).version == 2


def test_where_it_is(monkeypatch, tmp_path):
    assert default_seen() == tmp_path / "home" / ".finetune" / "seen"
    monkeypatch.setenv("FINETUNE_SEEN", "~/there")
    assert default_seen() == tmp_path / "home" / "there"
    here = SeenEntries("s3://bucket/registry")
    here.remember(NAME, 1, A)
    assert SeenEntries("s3://bucket/registry/").newest(NAME) == (1, A)
    assert SeenEntries("s3://bucket/other").newest(NAME) is None


def test_a_resolve_that_sees_nothing_new_writes_nothing(alice, monkeypatch):
    reader(alice).resolve(NAME)

    def refuse(*args, **kwargs):
        raise AssertionError("written")

    listed = []
    listdir = os.listdir
    monkeypatch.setattr(SeenEntries, "remember", refuse)
    monkeypatch.setattr(os, "listdir", lambda folder: listed.append(folder) or listdir(folder))
    reader(alice).resolve(NAME)
    assert len(listed) == 2 and len(set(listed)) == 1


def test_a_listing_that_missed_what_came_and_what_went_is_not_believed(tmp_path, monkeypatch):
    seen = SeenEntries(str(tmp_path))
    seen.remember(NAME, 6, A)
    listdir, answers = os.listdir, iter([["000000000004-" + B]])
    monkeypatch.setattr(os, "listdir", lambda folder: next(answers, None) or listdir(folder))
    assert seen.newest(NAME) == (6, A)


def _remember_and_look(location: str, first: int, step: int) -> None:
    seen = SeenEntries(location)
    before = 0
    for number in range(first, 400, step):
        seen.remember(NAME, number, A)
        now = seen.newest(NAME)
        assert now is not None and now[0] >= max(before, number), "the memory went back"
        before = now[0]


@pytest.mark.distributed
def test_the_memory_of_many_processes_never_goes_back(tmp_path):
    with ProcessPoolExecutor(4, mp_context=multiprocessing.get_context("spawn")) as pool:
        done = [pool.submit(_remember_and_look, str(tmp_path), first, 4) for first in range(1, 5)]
    assert [future.result() for future in done] == [None] * 4
    assert SeenEntries(str(tmp_path)).newest(NAME) == (399, A)
