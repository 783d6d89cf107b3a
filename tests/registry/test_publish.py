"""Publish: what it writes, what it refuses, and that a second try makes no second version."""

import json
import os
import uuid
from pathlib import Path

import pytest

from finetune.adapters.manifest import sha256_hex
from finetune.errors import AdapterReferenceError, ConflictError, IntegrityError, ManifestError, RegistryError
from finetune.registry import AdapterRegistry, verify
from tests.registry.faulty import Interfering
from tests.registry.folders import edit

pytestmark = pytest.mark.usefixtures("no_sync")


def test_what_lies_in_the_store(registry, make_adapter):
    folder = make_adapter()
    version = registry.publish(folder)
    root = Path(registry.location)
    about = json.loads((root / "registry.json").read_text())
    assert about["format"] == 1 and uuid.UUID(about["uuid"])
    digests = {p: sha256_hex(p.read_bytes()) for p in folder.iterdir()}
    assert digests[folder / "manifest.json"] == version.digest
    assert {p.relative_to(root).as_posix() for p in root.rglob("*") if p.is_file()} == {
        "registry.json",
        "names/medical/brain-mri/log/000000000001.json",
        *(f"blobs/sha256/{d[:2]}/{d}" for d in digests.values()),
    }
    registry.publish(make_adapter("medical/other"))
    assert json.loads((root / "registry.json").read_text()) == about


def test_the_same_files_are_stored_once_and_versions_counted(registry, make_adapter):
    folder = make_adapter()
    assert registry.publish(folder).digest == registry.publish(folder).digest
    newest = registry.resolve("medical/brain-mri")
    assert newest.version == 2
    assert registry.resolve(f"medical/brain-mri@sha256:{newest.digest}").version == 2


def test_a_publish_tried_again_happens_once(registry, make_adapter):
    folder, txn = make_adapter(seed=1), uuid.uuid4().hex
    first = registry.publish(folder, txn=txn, aliases=["prod"])
    registry.publish(make_adapter(seed=2))
    assert registry.publish(folder, txn=txn, aliases=["prod"]) == first
    assert AdapterRegistry(registry.location).publish(folder, txn=txn) == first
    assert registry.resolve("medical/brain-mri").version == 2
    with pytest.raises(
        ConflictError, match=f"`txn` must be new for a new publish, but entry 1 .publish. has {txn} already"
    ):
        registry.publish(make_adapter(seed=3), txn=txn)
    for wrong in ("", "mine", txn.upper() + "0"):
        with pytest.raises(RegistryError, match="cannot write this entry to the log: txn: String should match"):
            registry.publish(folder, txn=wrong)


def test_a_second_try_reads_only_what_came_since_the_first(registry, make_adapter):
    folder, name = make_adapter(), "medical/brain-mri"
    assert registry.new_txn(name).startswith("0" * 12)
    for _ in range(20):
        registry.publish(folder)
    txn = registry.new_txn(name)
    assert txn != registry.new_txn(name)
    mine = registry.publish(folder, txn=txn)
    registry.publish(folder)
    again, read = AdapterRegistry(registry.location), []
    again.store = Interfering(again.store, before=lambda verb, key: read.append(key) if "/log/" in key else None)
    again.resolve(name)  # who comes for the first time searches for the newest entry
    read.clear()
    assert again.publish(folder, txn=txn).version == mine.version == 21
    assert min(read) == f"names/{name}/log/000000000021.json"
    for txn in ("0" * 31 + "1", "f" * 32, f"{3:012x}" + "0" * 20):
        assert registry.publish(folder, txn=txn).version == registry.publish(folder, txn=txn).version


def test_one_alias_may_be_given_as_a_word(registry, make_adapter):
    assert registry.publish(make_adapter(), aliases="prod").aliases == ("latest", "prod")


@pytest.mark.parametrize("alias", ["Prod", "17", "../x", "a b", ""])
def test_bad_aliases_are_refused_before_anything_is_written(registry, make_adapter, alias):
    with pytest.raises(AdapterReferenceError, match="an alias must be a letter"):
        registry.publish(make_adapter(), aliases=[alias])
    assert not Path(registry.location).exists()


def test_folders_that_differ_from_their_manifest_are_refused(registry, make_adapter):
    seeds = iter(range(100))

    def refused(error, message, spoil):
        folder = make_adapter(seed=next(seeds))
        spoil(folder)
        with pytest.raises(error, match=message):
            registry.publish(folder)

    refused(IntegrityError, "lacks 'README.md', which its manifest lists", lambda f: (f / "README.md").unlink())
    refused(IntegrityError, "also holds 'x.bin', which its manifest does", lambda f: (f / "x.bin").write_text(""))
    refused(IntegrityError, "also holds 'sub', which its manifest does not", lambda f: (f / "sub").mkdir())
    refused(IntegrityError, "README.md: must have 20 bytes, got 19", lambda f: (f / "README.md").write_text("x" * 19))
    refused(
        IntegrityError, "README.md: must have 20 bytes, got more", lambda f: (f / "README.md").write_text("x" * 2**21)
    )
    refused(IntegrityError, "README.md: its sha256 is", lambda f: (f / "README.md").write_text("x" * 20))
    refused(
        ManifestError,
        "is not an adapter folder: it has no manifest.json",
        lambda f: (f / "manifest.json").unlink(),
    )
    refused(ManifestError, "manifest.json: not JSON", lambda f: (f / "manifest.json").write_text("{"))
    refused(ManifestError, "color: Extra inputs are not permitted", lambda f: edit(f, color=1))

    def link(name):
        def spoil(folder):
            os.rename(folder / name, folder.parent / "elsewhere")
            os.symlink(folder.parent / "elsewhere", folder / name)

        return spoil

    refused(IntegrityError, "'README.md' must be a plain file, not a link, a folder, a", link("README.md"))
    refused(ManifestError, "manifest.json must be a regular file, got a symbolic link", link("manifest.json"))
    with pytest.raises(ManifestError, match="nowhere is not an adapter folder"):
        registry.publish("nowhere")
    with pytest.raises(AdapterReferenceError, match="as 'retail/x': its manifest names 'medical/brain-mri'"):
        registry.publish(make_adapter(seed=1000), "retail/x")
    assert not Path(registry.location).exists()


def test_a_file_changed_while_it_is_stored_is_noticed(registry, make_adapter):
    folder = make_adapter()

    def change(verb, key):
        if key == "registry.json" and verb == "put":
            (folder / "README.md").write_text("X" * (folder / "README.md").stat().st_size)

    registry.store = Interfering(registry.store, change)
    with pytest.raises(IntegrityError, match="README.md: its sha256 is"):
        registry.publish(folder)
    assert registry.list() == []


@pytest.mark.parametrize("cut", [b"cut", b"", b"x" * 5000])
def test_a_copy_in_the_store_that_has_another_size_is_mended(registry, make_adapter, cut):
    folder = make_adapter()
    registry.publish(folder)
    for path in folder.iterdir():
        digest = sha256_hex(path.read_bytes())
        Path(registry.location, "blobs", "sha256", digest[:2], digest).write_bytes(cut)
    assert len(verify(registry).problems) > 0
    registry.publish(folder)
    assert verify(registry).problems == []
