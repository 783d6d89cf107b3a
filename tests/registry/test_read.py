"""Read: a version's bytes without a folder, each checked, from wherever the store is."""

import os

import pytest

from finetune.adapters.manifest import sha256_hex
from finetune.errors import IntegrityError, NotFoundError
from finetune.registry import AdapterRegistry, default_cache
from finetune.registry.storage.adapter_folders import blob_key

pytestmark = pytest.mark.usefixtures("no_sync")


class Elsewhere:
    """A store that is not on this machine."""

    def __init__(self, store):
        self._store = store

    def __getattr__(self, name):
        return getattr(self._store, name)


@pytest.fixture(params=["local", "elsewhere"])
def reader(request, registry):
    """Another one's registry over the same store."""
    other = AdapterRegistry(registry.location)
    if request.param == "elsewhere":
        other.store = Elsewhere(other.store)
    return other


def test_read_gives_the_bytes_that_were_published(registry, reader, make_adapter):
    folder = make_adapter()
    version = registry.publish(folder)
    for ref in ("medical/brain-mri", "medical/brain-mri@1", version):
        manifest, read = reader.read(ref)
        assert sha256_hex(manifest.to_bytes()) == version.digest
        assert all(read(name) == (folder / name).read_bytes() for name in manifest.files)
    # What is on this machine is not copied; what is not is, once.
    assert os.path.exists(default_cache()) == isinstance(reader.store, Elsewhere)
    with pytest.raises(NotFoundError, match="squares"):
        reader.read("medical/squares")


@pytest.mark.parametrize("spoil", ["a bit", "longer", "shorter", "gone"])
@pytest.mark.parametrize("what", ["adapter_model.safetensors", "manifest.json"])
def test_a_damaged_blob_is_refused(registry, reader, make_adapter, spoil, what):
    version = registry.publish(make_adapter())
    manifest, _ = registry.read(version)
    digest = version.digest if what == "manifest.json" else manifest.files[what].sha256
    blob = registry.store.root / blob_key(digest)
    data = bytearray(blob.read_bytes())
    if spoil == "gone":
        blob.unlink()
    else:
        data[7] ^= spoil == "a bit"
        blob.write_bytes(data[:-1] if spoil == "shorter" else data + b"x" if spoil == "longer" else data)
    message = "the registry is damaged: .*is not there" if spoil == "gone" else digest
    with pytest.raises(IntegrityError, match=message):
        _, read = reader.read(version)
        read("adapter_model.safetensors")


def test_what_was_pulled_is_checked_again_when_it_is_read(registry, make_adapter):
    registry.publish(make_adapter())
    registry.store = Elsewhere(registry.store)
    manifest, read = registry.read("medical/brain-mri")
    (file,) = default_cache().glob("*/adapter_model.safetensors")
    file.write_bytes(file.read_bytes()[::-1])
    with pytest.raises(IntegrityError, match="adapter_model.safetensors: its sha256 is"):
        read("adapter_model.safetensors")
    file.unlink()
    with pytest.raises(OSError, match="cannot read .*adapter_model.safetensors"):
        read("adapter_model.safetensors")
    _, read = registry.read("medical/brain-mri")  # which pulls it anew
    assert sha256_hex(read("adapter_model.safetensors")) == manifest.files["adapter_model.safetensors"].sha256
