"""Files in an adapter's folder: links, devices, other formats, and files that the manifest does not list."""

import io
import json
import os
import pickle
import stat
import zipfile
from functools import partial

import pytest
import torch

from finetune.adapters.manifest import CONFIG_NAME, MANIFEST_NAME, WEIGHTS_NAME
from finetune.errors import IntegrityError, ManifestError
from finetune.registry import AdapterRegistry
from tests.safety.forging import Case, Forgery, Payload, names, nothing, pickled

_FILES = (WEIGHTS_NAME, CONFIG_NAME, MANIFEST_NAME)


def symlink(forgery: Forgery, name: str) -> None:
    elsewhere = forgery.folder.parent / f"elsewhere-{name}"
    (forgery.folder / name).rename(elsewhere)
    (forgery.folder / name).symlink_to(elsewhere)


def fifo(forgery: Forgery, name: str) -> None:
    (forgery.folder / name).unlink()
    os.mkfifo(forgery.folder / name)


def device(forgery: Forgery, name: str) -> None:
    """Like /dev/zero, which never ends."""
    (forgery.folder / name).unlink()
    try:
        os.mknod(forgery.folder / name, stat.S_IFCHR | 0o666, os.makedev(1, 5))
    except PermissionError:
        pytest.skip("only root makes devices")


def folder(forgery: Forgery, name: str) -> None:
    (forgery.folder / name).unlink()
    (forgery.folder / name).mkdir()


def missing(forgery: Forgery, name: str) -> None:
    (forgery.folder / name).unlink()


def empty(forgery: Forgery, name: str) -> None:
    (forgery.folder / name).write_bytes(b"")


def sparse(forgery: Forgery, name: str) -> None:
    """Nine gigabytes that take no room on the disk."""
    os.truncate(forgery.folder / name, 9 * 2**30)


def flip_a_bit(forgery: Forgery, name: str) -> None:
    data = bytearray((forgery.folder / name).read_bytes())
    data[len(data) // 2] ^= 1
    (forgery.folder / name).write_bytes(data)


def in_place_of_weights(make):
    def forge(forgery: Forgery) -> None:
        forgery.weights = make(forgery.folder.parent / "canary")

    return forge


def torch_save(canary) -> bytes:
    path = canary.with_name("saved.pt")
    torch.save({"x": Payload(canary)}, path)
    return path.read_bytes()


def archive(canary) -> bytes:
    path = canary.with_name("weights.zip")
    with zipfile.ZipFile(path, "w") as file:
        file.writestr("../../data.pkl", pickled(canary))
    return path.read_bytes()


def only_a_bin(forgery: Forgery) -> None:
    (forgery.folder / WEIGHTS_NAME).unlink()
    (forgery.folder / "adapter_model.bin").write_bytes(pickled(forgery.folder.parent / "canary"))


def lists_a_bin(forgery: Forgery) -> None:
    forgery.manifest["files"]["adapter_model.bin"] = forgery.manifest["files"].pop(WEIGHTS_NAME)


def lists(name: str):
    def forge(forgery: Forgery) -> None:
        forgery.manifest["files"][name] = {"sha256": "0" * 64, "size": 1}

    return forge


def claims(**entry):
    def after(forgery: Forgery) -> None:
        forgery.manifest["files"][WEIGHTS_NAME] |= entry
        forgery.manifest_text(lambda text: json.dumps(forgery.manifest))

    return after


def case(name, after, error, message):
    return Case(name, nothing, error, message, after=after)


NOT_PLAIN = [
    case(
        f"{how.__name__} for {name}",
        partial(how, name=name),
        IntegrityError,
        f"{name} must be a regular file, but is missing",
    )
    for how in (symlink, fifo, device, folder, missing)
    for name in _FILES
]
PICKLES = [
    Case("a pickle renamed", in_place_of_weights(pickled), ManifestError, "must be a safetensors file"),
    Case("torch.save renamed", in_place_of_weights(torch_save), ManifestError, "must be a safetensors file"),
    Case("a zip renamed", in_place_of_weights(archive), ManifestError, "must be a safetensors file"),
    case(
        "only a .bin",
        only_a_bin,
        IntegrityError,
        "safetensors must be a regular file, but is missing .*into one folder; give that folder",
    ),
    Case("lists a .bin", lists_a_bin, ManifestError, "must list adapter_model.safetensors"),
]
LISTED = [
    Case(f"lists {kind}", lists(name), ManifestError, message)
    for kind, name, message in (
        ("a parent", "../../x", "String should match pattern"),
        ("an absolute path", "/etc/passwd", "String should match pattern"),
        ("a folder", ".git/config", "String should match pattern"),
        ("a device", "NUL.txt", "must not be a device of Windows, got 'NUL.txt'"),
        ("itself", "manifest.json", "must not list manifest.json"),
        ("itself in capitals", "Manifest.JSON", "must not list manifest.json"),
        ("a case twin", "Adapter_Model.safetensors", "names must not differ only in capitals"),
        ("a dot that Windows drops", "manifest.json.", "String should match pattern"),
        ("right to left", "x\u202egpj.exe", "String should match pattern"),
        ("300 characters", "x" * 300, "String should match pattern"),
    )
]
OTHER_BYTES = [
    case(
        "empty weights", partial(empty, name=WEIGHTS_NAME), IntegrityError, "must be the file that the manifest lists"
    ),
    case("empty config", partial(empty, name=CONFIG_NAME), IntegrityError, "must be the file that the manifest lists"),
    case("empty manifest", partial(empty, name=MANIFEST_NAME), ManifestError, "not JSON"),
    case("9 GB of weights", partial(sparse, name=WEIGHTS_NAME), IntegrityError, "must have at most 8589934592 bytes"),
    case("9 GB of config", partial(sparse, name=CONFIG_NAME), IntegrityError, "must have at most 4194304 bytes"),
    case("9 GB of manifest", partial(sparse, name=MANIFEST_NAME), IntegrityError, "must have at most 8388608 bytes"),
    case(
        "a bit of the weights",
        partial(flip_a_bit, name=WEIGHTS_NAME),
        IntegrityError,
        "must be the file that the manifest lists",
    ),
    case(
        "a bit of the config",
        partial(flip_a_bit, name=CONFIG_NAME),
        IntegrityError,
        "must be the file that the manifest lists",
    ),
    case("another digest", claims(sha256="0" * 64), IntegrityError, "manifest lists .sha256 0000000000000000"),
    case("another size", claims(size=2**62), IntegrityError, "the manifest lists 4611686018427387904 bytes"),
    case("a size below zero", claims(size=-1), ManifestError, "greater than or equal to 0"),
]


@pytest.mark.parametrize("case", [*NOT_PLAIN, *PICKLES, *LISTED, *OTHER_BYTES], ids=names)
def test_a_folder_is_refused(refused, case):
    refused(case)


def test_the_renamed_pickles_would_have_executed(canary):
    for read in (
        lambda: pickle.loads(pickled(canary)),
        lambda: torch.load(io.BytesIO(torch_save(canary)), weights_only=False)["x"],
    ):
        read().close()
        assert canary.exists()
        canary.unlink()


def put_git(path) -> None:
    (path / ".git").mkdir()
    (path / ".git" / "config").write_text("[core]\nfsmonitor = touch canary\n")


def put_link(path) -> None:
    (path / "extra").symlink_to("/etc/passwd")


def put_fifo(path) -> None:
    os.mkfifo(path / "extra")


def put_pickle(path) -> None:
    (path / "adapter_model.bin").write_bytes(pickled(path.parent / "canary"))


EXTRA = (put_git, put_link, put_fifo, put_pickle)


@pytest.mark.parametrize("put", EXTRA)
def test_only_what_the_manifest_lists_can_be_published(refused, tmp_path, put):
    registry = AdapterRegistry(tmp_path / "registry")
    message = "also holds '(.git|extra|adapter_model.bin)', which its manifest does not list"
    refused(case("extra", lambda forgery: put(forgery.folder), IntegrityError, message), registry.publish)
    assert not (tmp_path / "registry").exists(), "nothing was written"


@pytest.mark.parametrize("how", [symlink, fifo, device, folder])
def test_only_plain_files_can_be_published(refused, tmp_path, how):
    registry = AdapterRegistry(tmp_path / "registry")
    after = partial(how, name=WEIGHTS_NAME)
    refused(case("x", after, IntegrityError, "'adapter_model.safetensors' must be a plain file"), registry.publish)


@pytest.mark.parametrize("put", EXTRA)
def test_a_pulled_folder_that_was_added_to_is_made_anew(stage, tmp_path, canary, monkeypatch, put):
    monkeypatch.setattr("os.fsync", lambda descriptor: None)
    registry = AdapterRegistry(tmp_path / "registry")
    version = registry.publish(stage.good["lora"])
    pulled = registry.pull(version)
    put(pulled)
    monkeypatch.setattr(stage.vlm.switcher, "registry", registry)
    with stage.unharmed(pulled, canary):
        stage.vlm.remove(stage.vlm.add("testing/cell@1"))
        stage.vlm.switcher._aliases._meanings.clear()  # what the name stands for would stay known
    assert {path.name for path in registry.pull(version).iterdir()} == set(_FILES)


@pytest.mark.parametrize("put", EXTRA)
def test_what_a_manifest_does_not_list_is_never_opened(stage, tmp_path, canary, put):
    """A folder that one loads by its path may hold a README or what the hub's client keeps there."""
    path = Case("x", nothing, ManifestError, "").make(stage.good["lora"], tmp_path / "adapter")
    put(path)
    with stage.unharmed(path, canary):
        with stage.vlm.using(path):
            assert torch.equal(stage.answer(), stage.answers["lora"])
        stage.vlm.remove(stage.vlm.add(path))
