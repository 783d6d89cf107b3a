"""Signatures go wherever a version goes: copies, archives, and mirrors."""

import pytest

from finetune.errors import TrustError
from finetune.registry import AdapterRegistry, copy_adapter, export_archive, open_archive, promote, verify
from finetune.registry.storage.adapter_folders import read_signature
from finetune.registry.transfer.hub import write_hub_folder
from finetune.registry.transfer.oci import fetch_from_oci, push_to_oci
from finetune.registry.transfer.oci_client import OciRef
from tests.registry.signed import key, policy, read_entry
from tests.servers.docker_registry import docker_registry

NAME = "medical/brain-mri"


def test_a_signature_is_found_at_the_end_of_every_way(make_adapter, tmp_path, no_sync):
    signed = AdapterRegistry(tmp_path / "a", signer=key("alice"), trust=policy())
    signed.publish(make_adapter())
    promote(signed, f"{NAME}@1", "prod", require=["test.exact_match>=0.9"], force=True)
    entry = read_entry(tmp_path / "a", 2)
    assert entry.signature and entry.gate.forced
    assert verify(signed).problems == []
    other = AdapterRegistry(tmp_path / "b", trust=policy())
    copy_adapter(signed.store, other.store, NAME)
    v = other.resolve(f"{NAME}@prod")
    assert v.signature and read_signature(other.pull(v, tmp_path / "x")) == v.signature
    export_archive(other.store, [NAME], tmp_path / "t.tar")
    third = AdapterRegistry(tmp_path / "c", trust=policy())
    with open_archive(tmp_path / "t.tar") as source:
        copy_adapter(source, third.store, NAME)
    assert third.resolve(f"{NAME}@prod").signature == v.signature
    hub = write_hub_folder(other, v, tmp_path / "hub")
    assert read_signature(hub) == v.signature
    AdapterRegistry(tmp_path / "d").publish(hub)
    with docker_registry(tmp_path / "server") as host:
        done = push_to_oci(other, v, OciRef.parse(f"{host}/{NAME}"))
        fetch_from_oci(done, tmp_path / "oci")
    assert read_signature(tmp_path / "oci") == v.signature
    AdapterRegistry(tmp_path / "e").publish(tmp_path / "oci")


def test_a_copy_of_unsigned_entries_is_refused_where_signatures_are_required(make_adapter, tmp_path, no_sync):
    unsigned = AdapterRegistry(tmp_path / "a")
    unsigned.publish(make_adapter("medical/other"))
    reader = AdapterRegistry(tmp_path / "b", trust=policy())
    copy_adapter(unsigned.store, reader.store, "medical/other")
    with pytest.raises(TrustError):
        reader.resolve("medical/other")
    with pytest.raises(TrustError):
        push_to_oci(reader, AdapterRegistry(tmp_path / "b").resolve("medical/other"), OciRef.parse("localhost:1/x"))
