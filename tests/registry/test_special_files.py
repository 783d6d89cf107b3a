"""FIFOs and devices, wherever a file is expected: refused at once, and never waited for."""

import os
import signal
from pathlib import Path

import pytest

from finetune.adapters.folder import read_folder
from finetune.cli import main
from finetune.core.regular_file import NotRegularError, open_regular
from finetune.errors import IntegrityError, ManifestError, StoreError, TrustError
from finetune.registry import AdapterRegistry
from finetune.registry.log.commits import log_key
from finetune.registry.trust.signing import SigningKey

pytestmark = [
    pytest.mark.usefixtures("no_sync"),
    pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="Windows has no FIFOs"),
]


@pytest.fixture(autouse=True)
def no_waiting():
    """End a test that waits for a writer who never comes."""

    def late(*_):
        raise AssertionError("it waits")

    before = signal.signal(signal.SIGALRM, late)
    signal.alarm(30)
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, before)


def _fifo(path: Path) -> Path:
    path.unlink(missing_ok=True)
    os.mkfifo(path)
    return path


NAMES = ["manifest.json", "adapter_model.safetensors", "README.md", "manifest.sig", "notes.txt"]


@pytest.mark.parametrize("name", NAMES)
def test_in_an_adapter_folder(registry, make_adapter, name, capsys):
    folder = make_adapter()
    _fifo(folder / name)
    with pytest.raises((IntegrityError, ManifestError), match=f"{name}.*(a FIFO|its manifest does not list)"):
        registry.publish(folder)
    assert main(["registry", "verify-folder", str(folder)]) == 2 and name in capsys.readouterr().err
    assert not Path(registry.location).exists()


@pytest.mark.parametrize("name", NAMES[:2])
def test_a_folder_that_is_loaded(make_adapter, name):
    folder = make_adapter()
    _fifo(folder / name)
    with pytest.raises(IntegrityError, match=f"{name} must be a regular file, but is missing"):
        read_folder(folder)


def test_a_pulled_folder_is_built_anew_where_it_is_the_cache(registry, make_adapter, tmp_path):
    version = registry.publish(make_adapter())
    pulled = registry.pull(version)
    for name in ("manifest.json", "adapter_config.json"):
        _fifo(pulled / name)
        assert registry.pull(version) == pulled and (pulled / name).is_file()
    copy = registry.pull(version, tmp_path / "copy")
    _fifo(copy / "manifest.json")
    with pytest.raises(StoreError, match="copy holds something else already"):
        registry.pull(version, copy)


@pytest.mark.parametrize(
    "key", [log_key("medical", "brain-mri", 1), log_key("medical", "brain-mri", 2), "registry.json"]
)
def test_in_a_registry(registry, make_adapter, key):
    registry.publish(make_adapter())
    _fifo(Path(registry.location, key))
    with pytest.raises(StoreError, match=f"cannot read .*{key}: it is a FIFO, not a regular file. Remove it, or put"):
        AdapterRegistry(registry.location).resolve("medical/brain-mri")


def test_a_log_that_is_one_hides_no_other(registry, make_adapter):
    for name in ("medical/a", "medical/b"):
        registry.publish(make_adapter(name))
    _fifo(Path(registry.location, log_key("medical", "a", 1)))
    with pytest.warns(UserWarning, match="medical/a cannot be read and is not listed: .*a FIFO"):
        assert [version.full_name for version in registry.list()] == ["medical/b"]


def test_a_key(tmp_path):
    _fifo(tmp_path / "key.pem").chmod(0o600)
    with pytest.raises((StoreError, TrustError), match="key.pem: it is a FIFO, not a regular file"):
        SigningKey.load(tmp_path / "key.pem")


def test_what_is_opened_and_what_is_not(tmp_path):
    (tmp_path / "file").write_text("text")
    (tmp_path / "link").symlink_to("file")
    for name in ("file", "link"):
        with open_regular(tmp_path / name) as file:
            assert file.read() == b"text"
    (tmp_path / "device").symlink_to("/dev/zero")
    for path, what in ((_fifo(tmp_path / "fifo"), "a FIFO"), (tmp_path / "device", "a device")):
        with pytest.raises(NotRegularError, match=f"it is {what}, not a regular file"):
            open_regular(path)
    with pytest.raises(IsADirectoryError):
        open_regular(tmp_path)
    with pytest.raises(FileNotFoundError):
        open_regular(tmp_path / "nothing")


def test_a_file_that_becomes_one_meanwhile(tmp_path, monkeypatch):
    path = tmp_path / "file"
    path.write_text("text")
    seen = os.stat(path)
    _fifo(path)
    monkeypatch.setattr(os, "stat", lambda *args, **options: seen)
    with pytest.raises(NotRegularError):
        open_regular(path)
