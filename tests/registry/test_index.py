"""The index of ``list``: it saves reading, and never makes an answer wrong."""

import json
import os
import shutil
from pathlib import Path

import pytest

from finetune.adapters.manifest import sha256_hex
from finetune.errors import ConditionError, NotFoundError
from finetune.registry import AdapterRegistry, reindex
from finetune.registry.log.index import ListIndex
from finetune.registry.storage.location import registry_uuid
from tests.registry.faulty import Interfering
from tests.registry.folders import edit
from tests.registry.stepping import ClockedStore
from tests.scores import scores_json

pytestmark = pytest.mark.usefixtures("no_sync")


@pytest.fixture(params=["folder", "listing"])
def opened(request, registry):
    """Return a function that opens the registry anew and note what it reads: as a folder, or as other stores are."""

    def opener():
        found = AdapterRegistry(registry.location)
        found.read = []
        note = Interfering(found.store, before=lambda verb, key: found.read.append(key) if verb == "get" else None)
        if request.param == "folder":
            note.folders = found.store.folders
        found.store = note
        return found

    return opener


def _names_read(registry) -> set[str]:
    return {key.split("/log/")[0].removeprefix("names/") for key in registry.read if "/log/" in key}


def _index(registry) -> Path:
    return ListIndex(registry_uuid(registry.store), registry.location).path


def _without_index(registry) -> list:
    path = _index(registry)
    kept = path.read_bytes() if path.exists() else None
    path.unlink(missing_ok=True)
    versions = AdapterRegistry(registry.location).list()
    path.unlink()
    if kept is not None:
        path.write_bytes(kept)
    return versions


def test_only_what_changed_is_read(registry, make_adapter, opened):
    names = ["medical/a", "medical/b", "retail/a", "retail/b-c", "retail/b"]
    for name in names:
        registry.publish(make_adapter(name))
    first = opened()
    versions = first.list()
    assert [v.full_name for v in versions] == sorted(names, key=lambda n: n.split("/")) and _names_read(first) == set(
        names
    )
    changes = {
        "medical/a": lambda: registry.publish(make_adapter("medical/a", seed=1)),
        "retail/a": lambda: registry.alias("retail/a", "prod", 1),
        "medical/b": lambda: registry.yank("medical/b@1", reason="wrong"),
        "new/one": lambda: registry.publish(make_adapter("new/one")),
    }
    for name, change in changes.items():
        change()
        seen = opened()
        assert seen.list() == _without_index(registry) != versions
        assert _names_read(seen) == {name}
        again = opened()
        assert again.list() == (versions := seen.list()) and _names_read(again) == set()


def test_a_namespace_alone_leaves_the_rest_of_the_index(registry, make_adapter, opened):
    for name in ("medical/a", "retail/a"):
        registry.publish(make_adapter(name))
    assert [v.ref for v in registry.list("retail")] == ["retail/a@1"]
    assert [v.ref for v in registry.list("medical")] == ["medical/a@1"]
    seen = opened()
    assert len(seen.list()) == 2 and _names_read(seen) == set()
    shutil.rmtree(Path(registry.location, "names", "retail"))
    assert registry.list("retail") == [] and [v.ref for v in opened().list()] == ["medical/a@1"]
    assert "retail" not in _index(registry).read_text()


def test_a_registry_put_back_from_a_copy_is_not_taken_for_what_it_was(registry, make_adapter, opened, tmp_path):
    """Fewer entries than the index saw, or other ones in their place; and a copy that goes its own way."""
    folder = make_adapter()
    registry.publish(folder)
    shutil.copytree(registry.location, tmp_path / "copy")
    registry.alias("medical/brain-mri", "prod", 1)
    registry.alias("medical/brain-mri", "test", 1)
    assert opened().list()[0].aliases == ("latest", "prod", "test")
    copy = AdapterRegistry(tmp_path / "copy")
    assert copy.list()[0].aliases == ("latest",) and _index(copy) != _index(registry)
    shutil.rmtree(registry.location)
    shutil.copytree(tmp_path / "copy", registry.location)
    assert opened().list()[0].aliases == ("latest",)
    registry = AdapterRegistry(registry.location)
    registry.alias("medical/brain-mri", "blue", 1)
    assert opened().list()[0].aliases == ("blue", "latest")
    entry = Path(registry.location, "names/medical/brain-mri/log/000000000002.json")
    entry.unlink()
    AdapterRegistry(registry.location).alias("medical/brain-mri", "pink", 1)
    assert opened().list()[0].aliases == ("latest", "pink"), "of the same size, at the same place"


def test_a_clock_that_stands_still_hides_no_entry(make_adapter):
    """Object stores tell whole seconds, and two entries may well be of one size."""
    registry = AdapterRegistry("in memory")
    registry.store = ClockedStore()
    for seed in range(2):
        registry.publish(make_adapter(seed=seed))
    for version in (1, 2, 1, 2):
        registry.alias("medical/brain-mri", "prod", version)
        assert ("prod" in registry.list()[0].aliases) == (version == 2)


def test_a_damaged_index_is_made_anew(registry, make_adapter, opened):
    registry.publish(make_adapter())
    right = registry.list()
    path = _index(registry)
    good = path.read_bytes()
    damaged = [
        b"",
        b"\n",
        b"{}",
        good[:-1],
        good + b" ",
        b"0" * 64 + good[64:],
        good.replace(b"prod", b"x"),
        b"\xff" * 99,
    ]
    for place in range(0, len(good), 7):
        damaged.append(good[:place] + bytes([good[place] ^ 1 << place % 8]) + good[place + 1 :])
    for content in damaged:
        path.write_bytes(content)
        seen = opened()
        assert seen.list() == right
        assert path.read_bytes() == good
        assert bool(_names_read(seen)) == (content != good)


def test_an_index_of_another_release_is_made_anew(registry, make_adapter):
    registry.publish(make_adapter())
    right = registry.list()
    path = _index(registry)

    for names in (
        [],
        {"medical/brain-mri": 1},
        {"medical/brain-mri": {"seq": 1}},
        {"medical/brain-mri": {"version": {}}},
    ):
        body = json.dumps(names)
        path.write_text(f"{sha256_hex(body.encode())}\n{body}")
        assert registry.list() == right


def test_a_cache_that_cannot_be_written_is_done_without(registry, make_adapter, monkeypatch, tmp_path):
    registry.publish(make_adapter())
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("FINETUNE_CACHE", str(tmp_path / "file"))
    assert [v.ref for v in registry.list()] == [v.ref for v in registry.list()] == ["medical/brain-mri@1"]


def test_what_is_no_adapter_is_not_listed(registry, make_adapter, opened):
    registry.publish(make_adapter())
    names = Path(registry.location, "names")
    (names / "medical" / "begun" / "log").mkdir(parents=True)  # its first publish was killed
    (names / "medical" / "con" / "log").mkdir(parents=True)
    (names / "Medical" / "x").mkdir(parents=True)
    (names / "medical" / ".hidden").mkdir()
    (names / "README").write_text("")
    assert [v.ref for v in opened().list()] == ["medical/brain-mri@1"]


def test_reindex(registry, make_adapter):
    with pytest.raises(NotFoundError, match="there is no registry at"):
        reindex(registry)
    registry.publish(make_adapter("medical/a"))
    registry.publish(make_adapter("medical/b"))
    registry.list()
    path = _index(registry)
    before = path.read_bytes()
    os.utime(path, (0, 0))
    assert reindex(registry) == (path, 2)
    assert path.read_bytes() == before and path.stat().st_mtime > 0
    path.unlink()
    assert reindex(registry) == (path, 2) and path.exists()


def test_an_index_cannot_leave_the_cache(registry, make_adapter):
    """What a registry says of itself was written by others."""
    assert ListIndex("../../../etc/passwd", "/x").path.parent == ListIndex("", "").path.parent


# Filters.


@pytest.fixture
def several(registry, make_adapter):
    for name, task, score, seed in (
        ("medical/a", "vqa", 0.8, 0),
        ("medical/b", "vqa", 0.6, 1),
        ("retail/c", "contrastive", 0.9, 2),
    ):
        folder = make_adapter(name, seed)
        manifest = json.loads((folder / "manifest.json").read_text())
        base = manifest["base"] | {"config": str(seed) * 64, "hub_id": None if seed == 2 else f"toy/base-{seed}"}
        metrics = {"base": scores_json(0.5), "test": scores_json(score)}
        edit(folder, training=manifest["training"] | {"task": task}, base=base, metrics=metrics)
        registry.publish(folder)
    return registry


@pytest.mark.parametrize(
    ("asked", "names"),
    [
        ({}, "abc"),
        ({"task": "vqa"}, "ab"),
        ({"task": "VQA"}, ""),
        ({"base": "toy/base-0"}, "a"),
        ({"base": "toy/base"}, ""),
        ({"base": ""}, ""),
        ({"metric": "test.exact_match>=0.8"}, "ac"),
        ({"metric": ["test.exact_match>0.6", "test.exact_match<0.9"]}, "a"),
        ({"metric": "test.recall>=0"}, ""),
        ({"task": "vqa", "metric": "test.exact_match<0.7", "namespace": "medical"}, "b"),
        ({"task": "vqa", "namespace": "retail"}, ""),
    ],
)
def test_list_shows_what_is_asked_for(several, asked, names):
    for all_versions in (False, True):
        assert "".join(v.name for v in several.list(**asked, all_versions=all_versions)) == names


def test_a_base_is_asked_for_by_the_beginning_of_its_digest(several):
    for version in several.list():
        digest = version.summary["base"]
        for base in (digest, digest[:12], f"sha256:{digest}", f"sha256:{digest[:12]}"):
            assert several.list(base=base) == [version]


def test_a_condition_that_is_none_is_refused(several, tmp_path):
    for registry in (several, AdapterRegistry(tmp_path / "nowhere")):
        with pytest.raises(ConditionError, match="a condition must be the name of a value.* got 'accuracy'"):
            registry.list(metric="accuracy")
