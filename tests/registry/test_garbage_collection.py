"""gc: what it takes, what it leaves, and that it never takes what a publish is about to name."""

import itertools
import json
import os
import random
import time
from datetime import timedelta
from pathlib import Path

import pytest

from finetune.adapters.manifest import AdapterManifest, sha256_hex
from finetune.errors import ConflictError, IntegrityError, NotFoundError, RegistryError
from finetune.registry import AdapterRegistry, collect, verify
from finetune.registry.log.commits import Commit
from finetune.registry.maintenance import garbage_collection
from finetune.registry.storage import blobs
from finetune.registry.storage.blobs import LEAST_GRACE, blob_key, plan_bytes, plan_key
from tests.registry.faulty import Interfering, Killed
from tests.registry.stepping import Actor, ClockedStore

pytestmark = pytest.mark.usefixtures("no_sync")

DAY = 24 * 3600


def _age(registry, days: float, inside: str = "") -> None:
    """Make what lies in a folder registry so many days older."""
    for path in Path(registry.location, inside).rglob("*"):
        if path.is_file():
            then = path.stat().st_mtime - days * DAY
            os.utime(path, (then, then))


def _keys(registry) -> set[str]:
    return {p.relative_to(registry.location).as_posix() for p in Path(registry.location).rglob("*") if p.is_file()}


def _blobs(folder: Path) -> set[str]:
    return {blob_key(sha256_hex(path.read_bytes())) for path in folder.iterdir()}


def _abandon(registry, folder: Path) -> None:
    """Leave what a publish leaves that was killed before its entry."""

    def die(verb, key):
        if "/log/" in key:
            raise Killed

    dying = AdapterRegistry(registry.location)
    dying.store = Interfering(dying.store, before=die)
    with pytest.raises(Killed):
        dying.publish(folder)


@pytest.fixture
def littered(registry, make_adapter):
    """A registry with a published adapter, and one whose publish was killed, 10 days ago."""
    registry.publish(make_adapter("retail/shoes"))
    _abandon(registry, make_adapter())
    _age(registry, days=10)
    return registry


def test_what_nothing_names_goes_and_all_else_stays(littered, make_adapter, tmp_path):
    garbage = _blobs(tmp_path / "adapters" / "medical--brain-mri-0")
    garbage -= _blobs(tmp_path / "adapters" / "retail--shoes-0")  # the config is the same file
    before = _keys(littered)
    shown = collect(littered)
    assert {g.key for g in shown.garbage} == garbage and shown.deleted is None and len(garbage) == 3
    assert _keys(littered) == before, "a dry run deletes nothing, and leaves nothing"
    done = collect(littered, delete=True)
    assert done.deleted == done.garbage == shown.garbage
    assert _keys(littered) == before - garbage
    assert verify(littered).problems == []
    assert collect(littered, delete=True).deleted == []
    littered.publish(tmp_path / "adapters" / "medical--brain-mri-0")
    assert verify(littered).problems == [] and collect(littered).garbage == []


def test_what_is_young_stays(registry, make_adapter):
    registry.publish(make_adapter("retail/shoes"))
    _abandon(registry, make_adapter())
    _age(registry, days=6.9)
    found = collect(registry, delete=True)
    assert (found.garbage, found.deleted, found.young) == ([], [], 3)
    found = collect(registry, grace=timedelta(days=3))
    assert (len(found.garbage), found.young) == (3, 0)


def test_a_grace_period_that_no_publish_could_count_on_is_refused(littered):
    with pytest.raises(RegistryError, match="`grace` must be at least 2 days, got 1.5 days. A publish relies on"):
        collect(littered, grace=timedelta(days=1.5))
    assert collect(littered, grace=LEAST_GRACE).garbage


def test_every_version_is_kept_the_yanked_and_the_old_too(registry, make_adapter):
    for seed in range(3):
        registry.publish(make_adapter(seed=seed))
    registry.yank("medical/brain-mri@2")
    _age(registry, days=400)
    before = _keys(registry)
    assert collect(registry, delete=True).garbage == [] and _keys(registry) == before


def test_what_the_dead_leave_goes(littered):
    root = Path(littered.location)
    (root / "doctor" / ("b" * 32)).mkdir(parents=True)
    (root / "gc" / "plans").mkdir(parents=True)
    left = [
        f"names/retail/shoes/log/.tmp-{'0' * 32}",
        f".tmp-{'a' * 32}",
        f"doctor/{'b' * 32}/probe",
        f"gc/clock-{'c' * 32}",
        plan_key("d" * 32),
    ]
    for key in left:
        (root / key).write_text("left")
    mine = [
        "names/notes.txt",
        "names/retail/.tmp-mine",
        "blobs/sha256/README",
        f"blobs/sha256/ab/{'c' * 64}",
        ".DS_Store",
    ]
    for key in mine:
        (root / key).parent.mkdir(exist_ok=True)
        (root / key).write_text("not ours")
    before = _keys(littered)
    assert len(collect(littered, delete=True).garbage) == 3, "what is young may be at work"
    assert before - _keys(littered) and set(left) <= _keys(littered)
    _age(littered, days=8)
    done = collect(littered, delete=True)
    assert {g.key for g in done.deleted} == set(left)
    assert {g.key: g.why for g in done.deleted}[left[2]] == "left by a doctor that was killed"
    assert not set(left) & _keys(littered) and set(mine) <= _keys(littered)
    with pytest.raises(RegistryError, match="a temporary file of a writer must be named .tmp-"):
        littered.store.delete_aside("registry.json")


def test_no_registry(tmp_path):
    with pytest.raises(NotFoundError, match="there is no registry at .*nowhere"):
        collect(AdapterRegistry(tmp_path / "nowhere"))
    assert not (tmp_path / "nowhere").exists()


@pytest.mark.parametrize("damage", ["entry", "gap", "manifest", "no manifest", "newer"])
def test_nothing_goes_when_it_cannot_be_known_what_is_needed(littered, make_adapter, damage):
    version = littered.publish(make_adapter("retail/shoes", seed=1))
    _age(littered, days=10)
    manifest = Path(littered.location, blob_key(version.digest))
    entry = Path(littered.location, "names/retail/shoes/log/000000000001.json")
    if damage == "entry":
        entry.write_bytes(entry.read_bytes()[:-1])
    elif damage == "gap":
        entry.unlink()
    elif damage == "manifest":
        manifest.write_bytes(manifest.read_bytes().replace(b"1", b"2"))
    elif damage == "no manifest":
        manifest.unlink()
    else:
        entry.write_text(json.dumps(json.loads(entry.read_text()) | {"schema_version": 99}))
    before = _keys(littered)
    with pytest.raises(RegistryError if damage == "newer" else IntegrityError) as caught:
        collect(littered, delete=True)
    assert _keys(littered) == before
    if damage != "newer":
        assert "are not known, so nothing was deleted: " in str(caught.value) and "registry verify" in str(caught.value)


@pytest.mark.parametrize("off", [-365, 365])
def test_only_the_clock_of_the_store_counts(littered, make_adapter, monkeypatch, off):
    """A gc, and a publish, on machines whose clocks are a year off."""
    wrong = time.time() + off * DAY
    monkeypatch.setattr(garbage_collection.time, "time", lambda: wrong)
    young = make_adapter("medical/young")
    _abandon(littered, young)
    assert len(collect(littered, delete=True).deleted) == 3
    assert _blobs(young) <= _keys(littered)


def test_a_blob_from_the_future_is_written_again_before_it_is_counted_on(registry, make_adapter):
    folder = make_adapter()
    registry.publish(folder)
    _age(registry, days=-365)
    registry.publish(folder)
    for key in _blobs(folder):
        assert abs(Path(registry.location, key).stat().st_mtime - time.time()) < DAY


def test_a_publish_writes_what_is_old_again(registry, make_adapter):
    folder = make_adapter()
    registry.publish(folder)
    manifest = blob_key(sha256_hex((folder / "manifest.json").read_bytes()))
    for days, written in ((0.9, {manifest}), (0.2, _blobs(folder))):
        _age(registry, days=days)
        before = {key: Path(registry.location, key).stat().st_mtime for key in _blobs(folder)}
        registry.publish(folder)
        assert {key for key in before if Path(registry.location, key).stat().st_mtime != before[key]} == written


def test_a_publish_waits_for_a_gc_that_deletes_its_files(registry, make_adapter, monkeypatch):
    folder = make_adapter()
    registry.publish(make_adapter("retail/shoes"))
    registry.store.put(plan_key("1" * 32), plan_bytes(sorted(_blobs(folder))[:1]))
    pauses = []

    def ended(seconds):
        pauses.append(seconds)
        if len(pauses) == 3:
            registry.store.delete(plan_key("1" * 32))

    monkeypatch.setattr(blobs.time, "sleep", ended)
    assert registry.publish(folder).version == 1
    assert len(pauses) == 3


def test_a_publish_gives_up_when_that_gc_does_not_end(registry, make_adapter, monkeypatch):
    folder = make_adapter()
    monkeypatch.setattr(blobs.time, "sleep", lambda seconds: None)
    registry.publish(make_adapter("retail/shoes"))
    registry.store.put(plan_key("1" * 32), plan_bytes(_blobs(folder)))
    with pytest.raises(
        ConflictError,
        match=r"cannot store blobs/.*: a gc is deleting the blobs in gc/plans/1{32}.json. Try again .* latest after 20"
        r".* UTC. If no gc runs, delete that file",
    ):
        registry.publish(folder)
    assert [v.ref for v in registry.list()] == ["retail/shoes@1"]
    _age(registry, days=4.1, inside="gc")
    assert registry.publish(folder).version == 1, "a plan as old as that is of a gc that was killed"


BAD_PLANS = [
    b"", b"{", b"\xff\x00" * 99, b"[]", b'{"blobs":1}', b'{"blobs":"abc"}', b'{"blobs":[1]}', b'{"blobs":["a"]}',
    b'{"blobs":[],"until":"3000-01-01"}', b" " * (blobs.MAX_PLAN_BYTES + 1),
]  # fmt: skip


@pytest.mark.parametrize("plan", BAD_PLANS, ids=range(len(BAD_PLANS)))
def test_a_plan_that_cannot_be_read_ends_the_publish_at_once_by_its_name(registry, make_adapter, monkeypatch, plan):
    monkeypatch.setattr(blobs.time, "sleep", lambda seconds: pytest.fail("it waits"))
    registry.publish(make_adapter("retail/shoes"))
    registry.store.put(plan_key("1" * 32), plan)
    with pytest.raises(IntegrityError, match="gc/plans/1{32}.json: .*. If no gc runs, delete that file"):
        registry.publish(make_adapter())
    assert [v.ref for v in registry.list()] == ["retail/shoes@1"]
    registry.store.delete(plan_key("1" * 32))
    registry.publish(make_adapter("retail/shirts"))


def test_what_is_no_plan_of_a_gc_and_a_plan_from_the_future_are_passed_over(registry, make_adapter, monkeypatch):
    monkeypatch.setattr(blobs.time, "sleep", lambda seconds: pytest.fail("it waits"))
    folder = make_adapter()
    registry.publish(make_adapter("retail/shoes"))
    for name in ("notes.txt", "README", f"{'1' * 31}.json", f"{'1' * 32}.json.bak", "old/plan.json"):
        Path(registry.location, "gc/plans", name).parent.mkdir(parents=True, exist_ok=True)
        Path(registry.location, "gc/plans", name).write_bytes(b"garbage")
    registry.store.put(plan_key("1" * 32), plan_bytes(_blobs(folder)))
    future = time.time() + 2 * blobs.LONGEST.total_seconds()
    os.utime(Path(registry.location, plan_key("1" * 32)), (future, future))
    assert registry.publish(folder).version == 1


def test_a_publish_looks_once_more_after_its_entry(registry, make_adapter):
    """Its machine slept for a month between its last look and its entry, and gc came meanwhile."""
    folder = make_adapter()
    registry.publish(make_adapter("retail/shoes"))
    slept = []

    def sleep(verb, key):
        if verb == "put" and "/brain-mri/log/" in key and not slept:
            slept.append(key)
            _age(registry, days=30)
            assert collect(AdapterRegistry(registry.location), delete=True).deleted

    sleeping = AdapterRegistry(registry.location)
    sleeping.store = Interfering(registry.store, before=sleep)
    sleeping.publish(folder)
    assert slept and verify(registry).problems == []


def test_a_gc_that_slept_for_too_long_deletes_nothing_more(littered, monkeypatch):
    clock = [1e9]
    monkeypatch.setattr(garbage_collection.time, "time", lambda: clock[0])

    def sleep(verb, key):
        if verb == "delete" and key.startswith("blobs/"):
            clock[0] += 1.01 * DAY

    littered.store = Interfering(littered.store, after=sleep)
    done = collect(littered, delete=True)
    assert (len(done.garbage), len(done.deleted)) == (3, 1)
    assert [key for key in _keys(littered) if key.startswith("gc")] == []


# gc against publish, step by step.


class _Watched(ClockedStore):
    """Checks, whenever something goes or becomes true, that all that is named is there."""

    def put(self, key, data, *, mode="create"):
        super().put(key, data, mode=mode)
        if "/log/" in key:
            self.check(key)

    def delete(self, key):
        super().delete(key)
        if key.startswith("blobs/"):
            self.check(key)

    def check(self, why):
        for key, (raw, _) in list(self.objects.items()):
            if "/log/" in key:
                digest = Commit.parse(raw, source=key).manifest
                assert blob_key(digest) in self.objects, f"{why}: {key} lost its manifest"
                for entry in AdapterManifest.parse(self.objects[blob_key(digest)][0]).files.values():
                    assert blob_key(entry.sha256) in self.objects, f"{why}: {key} lost {entry.sha256}"


def _over(store) -> AdapterRegistry:
    registry = AdapterRegistry("in memory")
    registry.store = store
    return registry


def _publishing(folder):
    return lambda store: _over(store).publish(folder)


def _collecting(store):
    collect(_over(store), delete=True)


SITUATIONS = {
    "garbage": 30.0,  # what is published lies there already, long abandoned
    "nearly garbage": 6.9,  # the same, but it becomes garbage meanwhile
    "nearly old": 0.9,
    "some garbage": 30.0,  # of what is published only a part lies there
    "nothing": 30.0,  # what is garbage is not what is published
}


@pytest.fixture(scope="module")
def prepared(request):
    """Return a function that gives the store of a situation anew."""
    ready: dict[str, dict] = {}

    def prepare(situation: str, folder: Path, other: Path) -> _Watched:
        store = _Watched()
        if situation not in ready:
            registry = _over(store)
            registry.publish(other)
            entry = registry.log("medical/other")[0]
            kept = dict(store.objects)
            registry.publish(folder)
            log = next(key for key in store.objects if "/log/" in key and key not in kept)
            del store.objects[log]
            mine = sorted(store.objects.keys() - kept.keys())
            if situation == "some garbage":
                for key in mine[::2]:
                    del store.objects[key]
            if situation == "nothing":
                for key in mine:
                    del store.objects[key]
                store.objects[blob_key("0" * 64)] = (b"", store.now)
            assert entry.version == 1
            store.age(SITUATIONS[situation])
            ready[situation] = store.objects
        store.objects = dict(ready[situation])
        return store

    return prepare


def _end(store, folder, *actors) -> None:
    """Check how it ended: each did what it should or said why not, and it can be done again."""
    for actor in actors:
        assert actor.ended and isinstance(actor.error, ConflictError | Killed | None), actor.error
    store.check("in the end")
    store.now += timedelta(days=30)
    _over(store).publish(folder)
    collect(_over(store), delete=True)
    assert verify(_over(store)).problems == []
    assert [key for key in store.objects if key.startswith("gc/")] == []


@pytest.mark.parametrize("killed", [False, pytest.param(True, marks=pytest.mark.slow)])
@pytest.mark.parametrize(
    "situation", [pytest.param(s, marks=[] if s == "garbage" else pytest.mark.slow) for s in SITUATIONS]
)
def test_no_step_of_gc_between_two_of_publish_takes_what_is_named(
    make_adapter, prepared, monkeypatch, situation, killed
):
    """One goes so far, then the other so far, then the first to its end (or it is killed), then the other."""
    monkeypatch.setattr(blobs.time, "sleep", lambda seconds: None)
    monkeypatch.setattr(blobs, "MAX_ATTEMPTS", 3)
    folder, other = make_adapter(), make_adapter("medical/other")
    pairs = waited = 0
    for publish_first in (True, False):
        for first_steps in range(40):
            for second_steps in range(40):
                store = prepared(situation, folder, other)
                bodies = [_publishing(folder), _collecting]
                first, second = (Actor(store, body) for body in (bodies if publish_first else bodies[::-1]))
                first.step(first_steps)
                store.now += timedelta(days=0.45)
                second.step(second_steps)
                store.now += timedelta(days=0.45)
                over = first.ended, second.ended
                first.kill() if killed else first.step()
                second.step()
                waited += isinstance((first if publish_first else second).error, ConflictError)
                _end(store, folder, first, second)
                pairs += 1
                if over[1]:
                    break
            if over[0]:
                break
    print(f"{situation}: {pairs} pairs of steps, {waited} publishes were told to wait")
    assert pairs > 300


@pytest.mark.slow
def test_what_another_publish_writes_again_meanwhile_saves_nothing(make_adapter, prepared, monkeypatch):
    """Two publishes need a blob that a gc has looked at and is about to delete; one of them makes it young."""
    monkeypatch.setattr(blobs.time, "sleep", lambda seconds: None)
    monkeypatch.setattr(blobs, "MAX_ATTEMPTS", 3)
    folder, other = make_adapter(), make_adapter("medical/other")
    tried = 0
    for steps in itertools.count():
        for writes, deletions in itertools.product(range(8), range(4)):
            store = prepared("garbage", folder, other)
            mine, theirs = (Actor(store, _publishing(folder)) for _ in range(2))
            gc = Actor(store, _collecting)
            mine.step(steps)
            over = mine.ended
            for actor, verb, number in ((theirs, "put", writes), (gc, "delete", deletions)):
                while not actor.ended and number >= 0:
                    number -= actor.at[0] == verb and actor.at[1].startswith("blobs/")
                    actor.step(1 if number >= 0 else 0)
            theirs.step(1)
            mine.step()
            gc.step()
            theirs.step()
            _end(store, folder, mine, theirs, gc)
            tried += 1
        if over:
            break
    assert tried > 300


def test_a_clock_that_was_a_year_ahead_for_a_moment(make_adapter, prepared):
    folder, other = make_adapter(), make_adapter("medical/other")
    store = prepared("nearly old", folder, other)
    store.now += timedelta(days=365)
    gc = Actor(store, _collecting)
    while gc.at[:1] != ("put",) or "plan" not in gc.at[1]:
        gc.step(1)
    store.now -= timedelta(days=365)
    _over(store).publish(folder)
    gc.step()
    _end(store, folder, gc)


def test_many_publishes_and_gcs_in_any_order(make_adapter, prepared, monkeypatch):
    monkeypatch.setattr(blobs.time, "sleep", lambda seconds: None)
    monkeypatch.setattr(blobs, "MAX_ATTEMPTS", 3)
    folder, other = make_adapter(), make_adapter("medical/other")
    for seed in range(200):
        rng = random.Random(seed)
        store = prepared(rng.choice(list(SITUATIONS)), folder, other)
        actors = [Actor(store, body) for body in (_publishing(folder), _collecting) * 2]
        slept = 0.0
        while any(not actor.ended for actor in actors):
            actor = rng.choice(actors)
            if rng.random() < 0.01:
                actor.kill()
            actor.step(rng.randint(1, 6))
            pause = rng.choice([0, 0, 0.1, 0.4])
            if slept + pause < 0.9:
                store.now += timedelta(days=pause)
                slept += pause
        _end(store, folder, *actors)
