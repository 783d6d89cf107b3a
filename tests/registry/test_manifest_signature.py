"""The signature that lies beside a manifest: a folder can be believed without the registry it came from."""

import json
import os
import shutil

import pytest

from finetune.adapters.manifest import AdapterManifest
from finetune.errors import IntegrityError, ManifestError, StoreError, TrustError
from finetune.registry import AdapterRegistry, default_cache
from finetune.registry.trust.signing import manifest_message
from tests.registry.folders import same
from tests.registry.signed import NAME, key, policy, read_entry

pytestmark = pytest.mark.usefixtures("no_sync")


@pytest.fixture
def alice(registry, make_adapter) -> AdapterRegistry:
    alice = AdapterRegistry(registry.location, signer=key("alice"), trust=policy())
    alice.publish(make_adapter())
    return alice


@pytest.fixture
def offline(tmp_path) -> AdapterRegistry:
    """A user with a folder and a policy, and without a registry."""
    return AdapterRegistry(tmp_path / "nowhere", trust=policy())


def test_it_goes_with_the_folder(alice, offline, tmp_path):
    for into in (tmp_path / "out", None):
        folder = alice.pull(NAME, into)
        assert (folder / "manifest.sig").read_text() == f"{read_entry(alice.location, 1).manifest_signature}\n"
        before = (folder / "manifest.sig").stat().st_ino
        assert alice.pull(NAME, into) == folder
        assert (folder / "manifest.sig").stat().st_ino == before
    assert os.listdir(default_cache()) == [alice.resolve(NAME).digest]
    manifest, verdict = offline.guard.verify_folder(tmp_path / "out")
    assert (manifest.full_name, verdict.signer, verdict.problem) == (NAME, "alice", None)


def test_a_folder_published_again_is_signed_by_who_publishes_it(alice, tmp_path):
    folder = alice.pull(NAME, tmp_path / "out")
    other = AdapterRegistry(tmp_path / "other", signer=key("carol"))
    assert other.publish(folder).digest == alice.resolve(NAME).digest
    carols = other.pull(NAME, tmp_path / "carols")
    assert (carols / "manifest.sig").read_text().startswith(f"ed25519:{key('carol').id}:")
    (carols / "manifest.sig").unlink()
    (folder / "manifest.sig").unlink()
    assert same(folder, carols)


def test_the_cache_has_the_signature_of_the_version_that_was_asked_for(alice, make_adapter):
    """The same manifest, published unsigned, by alice and by carol: one folder of the cache."""
    digest = alice.resolve(NAME).digest
    folder = alice.pull(NAME)
    carol = AdapterRegistry(alice.location, signer=key("carol"))
    carol.publish(folder)
    assert carol.pull(f"{NAME}@2") == folder and folder.name == digest
    assert (folder / "manifest.sig").read_text().startswith(f"ed25519:{key('carol').id}:")
    AdapterRegistry(alice.location).publish(folder)
    assert AdapterRegistry(alice.location).pull(f"{NAME}@3") == folder
    AdapterRegistry(alice.location).pull(f"{NAME}@1")
    assert (folder / "manifest.sig").read_text().startswith(f"ed25519:{key('alice').id}:")


@pytest.mark.parametrize(
    ("spoil", "error", "message"),
    [
        (lambda f: (f / "README.md").write_text("x" * 20), IntegrityError, "README.md: its sha256 is"),
        (lambda f: (f / "x.bin").write_text(""), IntegrityError, "also holds 'x.bin'"),
        (
            lambda f: (f / "manifest.sig").write_text("alice was here"),
            TrustError,
            "manifest.sig: a signature must have the form ed25519:",
        ),
        (lambda f: (f / "manifest.sig").write_bytes(b"\xff" * 9), TrustError, "manifest.sig: .*utf-8"),
        (
            lambda f: (f / "manifest.sig").write_text("x" * 10**6),
            TrustError,
            "manifest.sig: a signature must have the form ed25519:",
        ),
        (
            lambda f: (f / "manifest.sig").rename(f / "x") and os.symlink(f / "x", f / "manifest.sig"),
            IntegrityError,
            "also holds 'x'",
        ),
        (
            lambda f: (f / "manifest.sig").unlink() or (f / "manifest.sig").mkdir(),
            IntegrityError,
            "'manifest.sig' must be a plain file",
        ),
        (lambda f: (f / "manifest.json").unlink(), ManifestError, "is not an adapter folder"),
    ],
)
def test_folders_that_are_not_what_was_pulled(alice, offline, tmp_path, spoil, error, message):
    folder = alice.pull(NAME, tmp_path / "out")
    spoil(folder)
    with pytest.raises(error, match=message):
        offline.guard.verify_folder(folder)


def test_a_link_for_a_signature_is_no_folder_of_ours(alice, tmp_path):
    folder = alice.pull(NAME)
    shutil.move(folder / "manifest.sig", tmp_path / "x")
    os.symlink(tmp_path / "x", folder / "manifest.sig")
    again = alice.pull(NAME)
    assert not (again / "manifest.sig").is_symlink() and (again / "manifest.sig").is_file()


def test_whose_folder_it_is(alice, offline, tmp_path, make_adapter):
    folder = alice.pull(NAME, tmp_path / "out")
    verify = offline.guard.verify_folder
    other = AdapterManifest.parse((make_adapter(seed=5) / "manifest.json").read_bytes())
    for signature, problem in (
        (
            key("alice").sign(manifest_message("0" * 64)),
            "its signature names the key of 'alice', which did not sign these bytes",
        ),
        (
            key("bob").sign(manifest_message(alice.resolve(NAME).digest)),
            "signed with the key of 'bob', which may not sign in",
        ),
        (key("eve").sign(manifest_message(alice.resolve(NAME).digest)), "signed with the unknown key"),
        # A signature of an entry of a log is none of a manifest.
        (
            read_entry(alice.location, 1).signature,
            "its signature names the key of 'alice', which did not sign these bytes",
        ),
    ):
        (folder / "manifest.sig").write_text(f"{signature}\n")
        assert problem in verify(folder)[1].problem
    (folder / "manifest.sig").unlink()
    assert verify(folder)[1].problem == "it is not signed"
    assert other.full_name == NAME
    revoked = AdapterRegistry(tmp_path / "nowhere", trust=policy(keys=("alice", "carol"), revoked=("alice",)))
    assert "revoked: stolen" in revoked.guard.verify_folder(alice.pull(NAME))[1].problem


@pytest.mark.parametrize("name", ["manifest.json", "manifest.sig"])
def test_a_manifest_lists_neither_itself_nor_its_signature(make_adapter, registry, name):
    folder = make_adapter()
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest["files"][name] = manifest["files"]["README.md"]
    (folder / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(ManifestError, match=f"must not list {name}"):
        registry.publish(folder)


def test_a_signature_that_cannot_be_written(alice, monkeypatch):
    alice.pull(NAME)
    (default_cache() / alice.resolve(NAME).digest / "manifest.sig").unlink()

    def refuse(*args):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", refuse)
    with pytest.raises(StoreError, match=r"cannot write .*manifest.sig: No space .*\(--into or FINETUNE_CACHE\)"):
        alice.pull(NAME)
    assert [path.name for path in default_cache().iterdir() if path.name.startswith(".")] == []
