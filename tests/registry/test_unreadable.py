"""One adapter whose log cannot be read hides no other: listings show the others, and name it."""

import json
import os
import warnings
from pathlib import Path

import pytest

from finetune.cli import main
from finetune.errors import IntegrityError, ManifestError, StoreError
from finetune.registry import AdapterRegistry, reindex, verify
from finetune.registry.log.commits import log_key
from finetune.registry.storage.adapter_folders import read_manifest
from finetune.registry.transfer.copying import copy_adapters, names_in
from tests.registry.faulty import Interfering
from tests.registry.folders import edit, forge

pytestmark = pytest.mark.usefixtures("no_sync")

WHOLE, DAMAGED = ["medical/a", "retail/c"], "medical/b"


def _cut(entry: Path) -> None:
    entry.write_bytes(entry.read_bytes()[:-40])


def _folder(entry: Path) -> None:
    entry.unlink()
    entry.mkdir()


def _behind_a_file(entry: Path) -> None:
    for path in entry.parent.iterdir():
        path.unlink()
    entry.parent.rmdir()
    entry.parent.write_text("")


DAMAGES = {
    "cut": _cut,
    "empty": lambda entry: entry.write_bytes(b""),
    "garbage": lambda entry: entry.write_bytes(b"\x00\xff\x1b[31m" * 99),
    "an impossible time": lambda entry: forge(entry, time="2031-13-45T99:00:00Z"),
    "a time that is none": lambda entry: forge(entry, time="----------"),
    "no metrics": lambda entry: forge(entry, summary={"metrics": 5}),
    "no scores": lambda entry: forge(entry, summary={"metrics": {"after": [1]}}),
    "a newer schema": lambda entry: entry.write_bytes(b'{"schema_version":4}'),
    "a folder": _folder,
    "a file in the place of its log": _behind_a_file,
}


@pytest.fixture
def damaged(registry, make_adapter):
    """Return a function that makes a registry of three adapters, of which one is damaged."""

    def make(damage) -> AdapterRegistry:
        for name in [*WHOLE, DAMAGED]:
            registry.publish(make_adapter(name))
        damage(Path(registry.location, log_key(*DAMAGED.split("/"), 1)))
        return AdapterRegistry(registry.location)

    return make


@pytest.mark.parametrize("all_versions", [False, True], ids=["latest", "all"])
@pytest.mark.parametrize("damage", DAMAGES.values(), ids=DAMAGES)
def test_the_whole_ones_are_listed_and_the_damaged_one_is_named(damaged, damage, all_versions):
    registry = damaged(damage)
    reported = []
    versions = registry.list(
        metric="test.exact_match>=0.7",
        all_versions=all_versions,
        onerror=lambda name, error: reported.append((name, str(error))),
    )
    assert [version.full_name for version in versions] == WHOLE
    if not all_versions or damage not in (_folder, _behind_a_file):  # which have no entry that could be listed
        assert [name for name, _ in reported] == [DAMAGED] and DAMAGED in reported[0][1]
    assert [version.full_name for version in registry.list("retail", onerror=None)] == ["retail/c"]


def test_a_listing_of_a_bucket_is_no_other(damaged):
    registry = damaged(_cut)
    registry.store = Interfering(registry.store)
    reported = []
    for _ in range(2):  # the second by the index
        assert [v.full_name for v in registry.list(onerror=lambda name, error: reported.append(name))] == WHOLE
    assert reported == [DAMAGED] * 2


def test_a_store_that_is_away_is_an_error_and_no_damage(damaged):
    registry = damaged(_cut)

    def fail(verb, key):
        if "/log/" in key:
            raise StoreError("the network is down")

    registry.store = Interfering(registry.store, before=fail)
    for all_versions in (False, True):
        with pytest.raises(StoreError, match="the network is down"):
            registry.list(all_versions=all_versions)


def test_who_gives_no_onerror_is_warned(damaged):
    registry = damaged(DAMAGES["garbage"])
    with pytest.warns(UserWarning, match="medical/b cannot be read and is not listed: names/medical/b/log/") as found:
        assert [version.full_name for version in registry.list()] == WHOLE
    assert found[0].filename == __file__
    with pytest.warns(UserWarning, match="medical/b cannot be read"):
        assert reindex(registry)[1] == 2


def test_the_damaged_one_is_an_error_where_it_is_asked_for(damaged):
    registry = damaged(DAMAGES["an impossible time"])
    with pytest.raises(IntegrityError, match="log/000000000001.json: not a valid log entry: time: "):
        registry.resolve(DAMAGED)
    assert registry.resolve(WHOLE[0]).version == 1
    assert [line.partition(":")[0] for line in verify(registry).problems] == ["names/medical/b/log/000000000001.json"]


def test_the_command_prints_the_whole_ones_and_ends_with_1(damaged, capsys):
    location = damaged(DAMAGES["garbage"]).location
    assert main(["registry", "list", "--registry", location]) == 1
    out, err = capsys.readouterr()
    assert [line.split("@")[0] for line in out.splitlines()[1:]] == WHOLE
    assert err.startswith("medical/b cannot be read: names/medical/b/log/000000000001.json: not JSON")
    assert err.count("\n") == 1 and "\x1b" not in err
    assert main(["registry", "list", "--json", "--registry", location]) == 1
    out, err = capsys.readouterr()
    assert [version["name"] for version in json.loads(out)] == ["a", "c"] and err.startswith("medical/b cannot be read")
    assert main(["registry", "list", "--all", "retail", "--registry", location]) == 0
    assert capsys.readouterr().err == ""


def test_the_command_names_what_cannot_be_read(registry, make_adapter, capsys):
    registry.publish(make_adapter())
    _cut(Path(registry.location, log_key("medical", "brain-mri", 1)))
    assert main(["registry", "list", "--registry", registry.location]) == 1
    assert capsys.readouterr().out == f"no adapters in {registry.location} can be read\n"


def test_the_whole_ones_are_copied(damaged, tmp_path):
    source, target = damaged(_cut), AdapterRegistry(tmp_path / "target")
    copied, refused = copy_adapters(source.store, target.store, names_in(source.store))
    assert [done.name for done in copied] == WHOLE
    assert [str(error).partition(":")[0] for error in refused] == ["cannot copy medical/b"]
    assert [version.full_name for version in target.list()] == WHOLE


@pytest.mark.parametrize(
    "created",
    ["----------", "2031-13-45T99:00:00Z", "2031-02-29T00:00:00Z", "2031-01-01T24:00:00Z", "2031-01-01T23:59:60Z",
     "2031-01-01", "2031-01-01T00:00:00", "2031-01-01T00:00:00+02:00", "2031-01-01T00:00:00Z\n",
     "٢٠٣١-01-01T00:00:00Z", "0000-01-01T00:00:00Z"],
)  # fmt: skip
def test_a_manifest_of_an_impossible_time_is_refused(registry, make_adapter, created):
    folder = make_adapter()
    edit(folder, created=created)
    with pytest.raises(ManifestError, match="manifest.json is not a valid manifest of schema 3: created: "):
        registry.publish(folder)
    assert not os.path.exists(registry.location)


@pytest.mark.parametrize("created", ["2031-01-01T23:59:59Z", "2032-02-29T00:00:00+00:00"])
def test_a_manifest_of_a_time_is_read(make_adapter, created):
    folder = make_adapter()
    edit(folder, created=created)
    assert read_manifest(folder)[1].created == created


def test_nothing_is_warned_of_where_all_is_well(registry, make_adapter):
    registry.publish(make_adapter())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert len(registry.list()) == len(registry.list(all_versions=True)) == 1
