"""Pull: the folder that was published, whole and checked, or an error and no folder."""

import errno
import os
from pathlib import Path

import pytest

from finetune.adapters.manifest import sha256_hex
from finetune.errors import IntegrityError, StoreError
from finetune.registry import default_cache
from tests.registry.folders import same

pytestmark = pytest.mark.usefixtures("no_sync")


def test_pull_gives_the_folder_back(registry, make_adapter, tmp_path):
    folder = make_adapter()
    version = registry.publish(folder)
    cached = registry.pull("medical/brain-mri")
    assert cached == default_cache() / version.digest
    assert same(cached, folder)
    into = registry.pull(version.ref, tmp_path / "a" / "b")
    assert into == tmp_path / "a" / "b" and same(into, folder)
    assert os.listdir(tmp_path / "a") == ["b"] and os.listdir(default_cache()) == [version.digest]
    (tmp_path / "empty").mkdir()
    assert same(registry.pull(version.ref, str(tmp_path / "empty")), folder)


def test_a_folder_that_is_right_is_left_as_it_is(registry, make_adapter, tmp_path):
    registry.publish(make_adapter())
    for into in (None, tmp_path / "out"):
        folder = registry.pull("medical/brain-mri", into)
        before = folder.stat().st_ino
        assert registry.pull("medical/brain-mri", into).stat().st_ino == before


@pytest.mark.parametrize(
    "spoil",
    [
        lambda f: (f / "README.md").write_bytes(b"X" + (f / "README.md").read_bytes()[1:]),
        lambda f: (f / "README.md").unlink(),
        lambda f: (f / "manifest.json").write_text("{}"),
        lambda f: (f / "manifest.json").unlink(),
        lambda f: (f / "adapter_model.bin").write_text("pickle"),
        lambda f: (f / ".gitattributes").write_text("of a download"),
        lambda f: (f.rename(f.parent / "moved"), f.write_text("a file")),
        lambda f: (f.rename(f.parent / "moved"), os.symlink(f.parent / "void", f)),
    ],
)
def test_a_spoilt_cache_is_built_anew(registry, make_adapter, spoil):
    folder = make_adapter()
    registry.publish(folder)
    spoil(registry.pull("medical/brain-mri"))
    assert same(registry.pull("medical/brain-mri"), folder)
    assert [p.name for p in default_cache().iterdir() if p.name.startswith(".")] == []


def test_what_a_user_has_is_never_replaced(registry, make_adapter, tmp_path):
    registry.publish(make_adapter())
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("years")
    with pytest.raises(StoreError, match="mine holds something else already. Choose a folder that does not exist yet"):
        registry.pull("medical/brain-mri", tmp_path / "mine")
    with pytest.raises(StoreError, match="thesis.txt holds something else already"):
        registry.pull("medical/brain-mri", tmp_path / "mine" / "thesis.txt")
    assert (tmp_path / "mine" / "thesis.txt").read_text() == "years"
    assert os.listdir(tmp_path / "mine") == ["thesis.txt"]


def test_nothing_damaged_is_pulled(registry, make_adapter, tmp_path):
    folder = make_adapter()
    version = registry.publish(folder)
    for path in folder.iterdir():
        digest = sha256_hex(path.read_bytes())
        blob = Path(registry.location, "blobs", "sha256", digest[:2], digest)
        blob.write_bytes(b"X" + path.read_bytes()[1:])
        with pytest.raises(IntegrityError, match=f"{digest}: its sha256 is"):
            registry.pull(version.ref, tmp_path / "out")
        blob.unlink()
        with pytest.raises(
            IntegrityError, match=f"cannot pull .*@1, because the registry is damaged: .*{digest} is not"
        ):
            registry.pull(version.ref, tmp_path / "out")
        blob.write_bytes(path.read_bytes())
    assert not (tmp_path / "out").exists()
    assert same(registry.pull(version.ref, tmp_path / "out"), folder)


def test_a_log_copied_to_another_name_gives_nothing(registry, make_adapter):
    registry.publish(make_adapter())
    root = Path(registry.location, "names")
    (root / "retail").mkdir()
    os.rename(root / "medical" / "brain-mri", root / "retail" / "shoes")
    with pytest.raises(
        IntegrityError, match="must be a manifest of retail/shoes, whose log names it, got one of medical/brain-mri"
    ):
        registry.pull("retail/shoes")


@pytest.mark.parametrize(("function", "number"), [("fsync", errno.ENOSPC), ("mkdir", errno.EACCES)])
def test_a_full_disk_while_pulling(registry, make_adapter, tmp_path, monkeypatch, function, number):
    registry.publish(make_adapter())

    def fail(*args, **kwargs):
        raise OSError(number, os.strerror(number))

    with monkeypatch.context() as patch:
        patch.setattr(os, function, fail)
        with pytest.raises(StoreError, match=r"cannot write .*out: .* another folder \(--into or FINETUNE_CACHE\)"):
            registry.pull("medical/brain-mri", tmp_path / "deep" / "out")
    assert [p for p in tmp_path.rglob("*") if p.name == "out" or p.name.startswith(".pull")] == []
    registry.pull("medical/brain-mri", tmp_path / "deep" / "out")
