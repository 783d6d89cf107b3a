"""What is written for others goes nowhere into the folder of a registry, which holds objects alone."""

from pathlib import Path

import pytest

from finetune.errors import StoreError
from finetune.registry import AdapterRegistry
from finetune.registry.storage.location import refuse_in_registry
from finetune.registry.transfer.archive import export_archive
from finetune.registry.transfer.mirror_folder import new_folder
from tests.registry.folders import same

pytestmark = pytest.mark.usefixtures("no_sync")
NAME = "medical/brain-mri"


def _mirror(registry, place):
    with new_folder(place, elsewhere=" (--into)"):
        pytest.fail("entered")


WRITERS = {
    "pull": lambda registry, place: registry.pull(NAME, place),
    "mirror": _mirror,
    "archive": lambda registry, place: export_archive(registry.store, [NAME], place),
}


@pytest.mark.parametrize("where", ["copy", "names/medical/copy", "deep/../blobs/copy"])
@pytest.mark.parametrize("write", WRITERS.values(), ids=WRITERS)
def test_nothing_is_written_into_a_registry(registry, make_adapter, tmp_path, write, where):
    registry.publish(make_adapter())
    other = AdapterRegistry(tmp_path / "other")
    other.publish(make_adapter("retail/shoes"))
    for root in (registry.location, other.location):
        before = sorted(Path(root).rglob("*"))
        with pytest.raises(StoreError, match=f"copy lies in the registry {root}, which holds .* outside of it .--"):
            write(registry, Path(root, where))
        assert sorted(Path(root).rglob("*")) == before


def test_a_damaged_registry_and_one_of_a_newer_format_are_registries_too(registry, make_adapter):
    registry.publish(make_adapter())
    for content in (b"garbage", b'{"format":2}'):
        Path(registry.location, "registry.json").write_bytes(content)
        with pytest.raises(StoreError, match="lies in the registry"):
            refuse_in_registry(Path(registry.location, "copy"), elsewhere="")


def test_beside_a_registry_and_below_another_file_of_that_name(registry, make_adapter, tmp_path):
    folder = make_adapter()
    registry.publish(folder)
    (tmp_path / "registry.json").write_text('{"items": []}')
    assert same(registry.pull(NAME, tmp_path / "copy"), folder)
    refuse_in_registry(Path(registry.location), elsewhere="")
