"""Registries that release 0.1 wrote: their summaries hold the names of then, and are read under today's."""

import json
import shutil

import pytest

from finetune.core.cache import read_note, write_note
from finetune.metrics.names import named_values
from finetune.registry import AdapterRegistry, promote, verify
from finetune.registry.log.index import ListIndex
from finetune.registry.storage.location import registry_uuid
from finetune.registry.transfer.copying import copy_adapter
from tests.regression.nets import NETS

pytestmark = pytest.mark.usefixtures("no_sync")
NAME = "regression/colors"


@pytest.fixture
def old(tmp_path):
    shutil.copytree(NETS[0] / "registry", tmp_path / "old")
    return AdapterRegistry(tmp_path / "old")


def test_the_log_keeps_its_old_words_and_shows_todays(old):
    entry = old.log(NAME)[0]
    assert entry.summary["metrics"].keys() == {"before", "after"}, "its digest is over these"
    assert named_values(entry.current_summary["metrics"]) == {
        f"{who}.{name}": value
        for who in ("test", "base")
        for name, value in (
            ("exact_match", 0.75), ("majority.exact_match", 0.5), ("blank_image.exact_match", 0.25), ("n", 4.0),
        )
    }  # fmt: skip
    assert old.resolve(f"{NAME}@1").summary == entry.current_summary
    assert verify(old).problems == []


def test_it_is_listed_gated_and_written_on_under_todays_names(old):
    assert {version.name for version in old.list(metric=["test.exact_match>=0.75", "base.n==4"])} == {
        "colors",
        "matching",
    }
    assert old.list(metric="test.exact_match>0.75") == []
    promote(old, f"{NAME}@1", "best", require=["test.color.exact_match>=0.75", "test.majority.exact_match<=0.5"])
    assert old.resolve(f"{NAME}@best").version == 1 and verify(old).problems == []


def test_it_is_copied_as_it_is(old, tmp_path):
    new = AdapterRegistry(tmp_path / "new")
    copied = copy_adapter(old.store, new.store, NAME)
    assert copied.versions == 3 and verify(new).problems == []
    assert [entry.digest for entry in new.log(NAME)] == [entry.digest for entry in old.log(NAME)]


def test_an_index_that_release_0_1_made_is_read_under_todays_names(old):
    path = ListIndex(registry_uuid(old.store), old.location).path
    assert len(old.list()) == 2
    index = json.loads(read_note(path))
    for name, known in index.items():
        known["version"]["summary"] = old.log(name)[0].summary
    write_note(path, json.dumps(index))
    assert [version.name for version in AdapterRegistry(old.location).list(metric="test.exact_match==0.75")] == [
        "colors",
        "matching",
    ]
