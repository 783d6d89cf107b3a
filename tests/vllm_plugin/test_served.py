"""From a reference to a folder for vLLM: what is checked on the way, and what is kept."""

import json
import os
import shutil
import subprocess
import sys
import threading
import warnings
from pathlib import Path
from subprocess import PIPE

import pytest
import torch
from safetensors.torch import load_file

from finetune.adapters.folder import verify
from finetune.errors import (
    AdapterReferenceError,
    BaseMismatchError,
    ExportError,
    IntegrityError,
    ManifestError,
    NotFoundError,
    StoreError,
    TrustError,
    YankedError,
)
from finetune.export.exporting import export_adapter
from finetune.registry import AdapterRegistry, SigningKey
from finetune.tasks.contrastive import ContrastiveConfig
from finetune.vllm_plugin.base import chat_template_of, identify_served
from finetune.vllm_plugin.served import ServedAdapters, put_folder, require_described
from tests.vllm_plugin.conftest import NAME


def digest(registry, version):
    return registry.resolve(f"{NAME}@{version}").digest


def test_a_reference_becomes_a_digest_and_a_folder(served, registry):
    pinned = served.pinned(f"{NAME}@prod")
    assert pinned == f"{NAME}@sha256:{digest(registry, 1)}" == served.pinned(f"{NAME}@1") == served.pinned(pinned)
    folder = served.folder(pinned)
    assert sorted(path.name for path in folder.iterdir()) == ["adapter_config.json", "adapter_model.safetensors"]
    assert served.folder(pinned) == folder


@pytest.mark.parametrize("version", [1, 2])
def test_it_is_what_the_export_writes(served, registry, published, tmp_path, version):
    folder = served.folder(served.pinned(f"{NAME}@{version}"))
    done = export_adapter(
        f"{NAME}@{version}", to="vllm", output=tmp_path / "out", registry=registry, base=str(published.base)
    )
    name = "adapter_model.safetensors"
    assert (folder / name).read_bytes() == (done.folder / name).read_bytes()
    ours, theirs = (json.loads((path / "adapter_config.json").read_text()) for path in (folder, done.folder))
    assert ours == {field: theirs[field] for field in ours}
    assert ours["lora_alpha"] == ours["r"]


def test_an_alias_that_moves_is_seen(served, registry):
    assert served.pinned(f"{NAME}@prod").endswith(digest(registry, 1))
    registry.alias(NAME, "prod", 2)
    assert served.pinned(f"{NAME}@prod").endswith(digest(registry, 2))


def test_an_alias_is_looked_up_again_after_its_seconds_only(registry, base):
    served = ServedAdapters(registry, base, alias_seconds=3600)
    served.pinned(f"{NAME}@prod")
    registry.alias(NAME, "prod", 2)
    assert served.pinned(f"{NAME}@prod").endswith(digest(registry, 1))


@pytest.mark.parametrize(
    "version, why", [(3, "it supports no DoRA"), (4, "another base"), (5, "at most --max-lora-rank 8")]
)
def test_an_alias_that_moves_to_what_cannot_be_served_stays(served, registry, version, why):
    served.pinned(f"{NAME}@prod")
    registry.alias(NAME, "prod", version)
    with pytest.warns(UserWarning, match=f"still answers with version 1: .*{why}"):
        assert served.pinned(f"{NAME}@prod").endswith(digest(registry, 1))


@pytest.mark.parametrize(
    "version, error, why",
    [
        (3, ExportError, "it supports no DoRA"),
        (4, BaseMismatchError, "trained on another base"),
        (5, ExportError, "at most --max-lora-rank 8"),
        (99, NotFoundError, "@99 does not exist"),
    ],
)
def test_what_is_refused_leaves_nothing(served, tmp_path, version, error, why):
    with pytest.raises(error, match=why):
        served.pinned(f"{NAME}@{version}")
    assert not (tmp_path / "cache" / "vllm").exists()


@pytest.mark.parametrize(
    "text", ["../../etc/passwd", "/etc/passwd", "a/../b@prod", "testing/cell@../x", "testing\\cell", "~/x"]
)
def test_no_path_is_a_reference(served, text):
    with pytest.raises(AdapterReferenceError):
        served.pinned(text)


def test_a_yanked_version(served, registry):
    registry.yank(f"{NAME}@1", reason="wrong labels")
    with pytest.raises(YankedError):
        served.pinned(f"{NAME}@prod")


def test_another_template_or_tokenizer(registry, published, tmp_path):
    served = identify_served(str(published.base), revision=None, chat_template="{{ other }}", max_lora_rank=8)
    with pytest.raises(BaseMismatchError, match="trained with another chat template"):
        ServedAdapters(registry, served).pinned(f"{NAME}@1")
    shutil.copytree(published.base, tmp_path / "base")
    (tmp_path / "base" / "tokenizer_config.json").write_text("{}")
    other = identify_served(str(tmp_path / "base"), revision=None, chat_template=None, max_lora_rank=8)
    with pytest.raises(BaseMismatchError, match="trained with another tokenizer"):
        ServedAdapters(registry, other).pinned(f"{NAME}@1")


def test_the_template_is_the_processor_s(published, tmp_path):
    assert "{%" in chat_template_of(published.base)
    assert chat_template_of(tmp_path) == ""
    (tmp_path / "tokenizer_config.json").write_text('{"chat_template": "of the tokenizer"}')
    assert chat_template_of(tmp_path) == "of the tokenizer"
    (tmp_path / "chat_template.json").write_text('{"chat_template": "of the processor"}')
    assert chat_template_of(tmp_path) == "of the processor"
    (tmp_path / "chat_template.jinja").write_text("now")
    assert chat_template_of(tmp_path) == "now"


def test_a_flipped_bit(served, registry):
    entry = registry.read(f"{NAME}@1")[0].files["adapter_model.safetensors"]
    blob = Path(registry.location) / "blobs" / "sha256" / entry.sha256[:2] / entry.sha256
    data = bytearray(blob.read_bytes())
    data[-1] ^= 1
    blob.chmod(0o644)
    blob.write_bytes(data)
    with pytest.raises(IntegrityError):
        served.pinned(f"{NAME}@1")


def test_an_unsigned_version(registry, base, tmp_path):
    line = SigningKey.generate().public("release").line
    trust = tmp_path / "trust.yaml"
    trust.write_text(f"keys: ['{line}']\nnamespaces: {{testing: {{signatures: require, keys: [release]}}}}\n")
    strict = AdapterRegistry(registry.location, trust=trust)
    with pytest.raises(TrustError, match="is not signed"):
        ServedAdapters(strict, base).pinned(f"{NAME}@1")


@pytest.mark.parametrize("ref", [f"{NAME}@prod", f"{NAME}@1"])
def test_a_policy_that_changes_holds_at_the_next_request(registry, base, tmp_path, ref):
    trust = tmp_path / "trust.yaml"
    trust.write_text("keys: []\n")
    served = ServedAdapters(AdapterRegistry(registry.location, trust=trust), base, alias_seconds=3600)
    pinned = served.pinned(ref)
    trust.write_text("keys: []\nnamespaces: {testing: {signatures: require}}\n")
    for name in (ref, pinned):
        with pytest.raises(TrustError):
            served.pinned(name)


def test_a_kept_folder_is_compared(served, registry, base):
    folder = served.folder(served.pinned(f"{NAME}@1"))
    weights = folder / "adapter_model.safetensors"
    data = weights.read_bytes()
    weights.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    with pytest.raises(IntegrityError, match="must hold the files of its adapter, but they have changed. Delete it"):
        ServedAdapters(registry, base).pinned(f"{NAME}@1")
    weights.write_bytes(data)
    assert ServedAdapters(registry, base).folder(served.pinned(f"{NAME}@1")) == folder
    (folder / "more.bin").touch()
    with pytest.raises(IntegrityError):
        ServedAdapters(registry, base).pinned(f"{NAME}@1")


def test_a_cache_that_cannot_be_written(served, tmp_path):
    (tmp_path / "cache").mkdir(exist_ok=True)
    (tmp_path / "cache" / "vllm").touch()
    with pytest.raises(StoreError, match="FINETUNE_CACHE"):
        served.pinned(f"{NAME}@1")


def test_many_at_once_make_one_folder(tmp_path):
    files, faults = {"a": b"1" * 100_000, "b": b"2"}, []

    def put():
        try:
            put_folder(tmp_path / "vllm" / "x", files)
        except BaseException as error:
            faults.append(error)

    threads = [threading.Thread(target=put) for _ in range(16)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not faults
    assert [path.name for path in (tmp_path / "vllm").iterdir()] == ["x"]


@pytest.mark.distributed
def test_many_processes_make_one_folder(tmp_path):
    code = (
        "import sys; from pathlib import Path; from finetune.vllm_plugin.served import put_folder; "
        "print('ready', flush=True); sys.stdin.readline(); "
        "[put_folder(Path(sys.argv[1]) / str(i), {'a': b'1' * 9999, 'b': b''}) for i in range(50)]"
    )
    command = [sys.executable, "-c", code, str(tmp_path / "vllm")]
    processes = [subprocess.Popen(command, stdin=PIPE, stdout=PIPE, text=True) for _ in range(4)]
    for process in processes:
        assert process.stdout.readline() == "ready\n"
    for process in processes:
        process.communicate("go\n", timeout=60)
    assert [process.returncode for process in processes] == [0] * 4
    assert sorted(int(path.name) for path in (tmp_path / "vllm").iterdir()) == list(range(50))


def test_one_who_is_overtaken_takes_what_is_there(tmp_path, monkeypatch):
    rename = os.rename

    def late(source, target):
        put = Path(target)
        put.mkdir()
        (put / "a").write_bytes(b"1")
        rename(source, target)

    monkeypatch.setattr(os, "rename", late)
    put_folder(tmp_path / "x", {"a": b"1"})
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".")] == []


def test_tensors_that_are_not_those_of_the_modules(registry):
    manifest, read = registry.read(f"{NAME}@1")
    require_described(manifest)
    name = next(iter(manifest.adapter.tensors))
    raw = manifest.model_dump()
    for change, why in (
        (lambda table: table.pop(name), r"must have rank 4 as in its config, got shape \[\]"),
        (lambda table: table[name].update(shape=[3, 64]), r"must have rank 4 as in its config, got shape \[3, 64\]"),
        (
            lambda table: table.update({"base_model.model.lm_head.weight": table[name]}),
            "must belong to a module of the adapter, got .*lm_head",
        ),
    ):
        table = {key: dict(entry) for key, entry in raw["adapter"]["tensors"].items()}
        change(table)
        wrong = type(manifest).model_validate({**raw, "adapter": {**raw["adapter"], "tensors": table}})
        with pytest.raises(ManifestError, match=why):
            require_described(wrong)


def test_a_contract_for_another_kind_of_base(served, monkeypatch):
    manifest, read = served.registry.read(f"{NAME}@1")
    prompt_spec = ContrastiveConfig(name="contrastive", text_template="a {label}", answer_normalization="vqa")
    other = manifest.model_copy(update={"task": prompt_spec})
    monkeypatch.setattr(served.registry, "read", lambda version: (other, read))
    with pytest.raises(ManifestError, match="the task must fit the architecture of the base: task contrastive"):
        served.pinned(f"{NAME}@1")


def test_an_adapter_of_no_module(served, monkeypatch):
    manifest, read = served.registry.read(f"{NAME}@1")
    (part,) = manifest.adapter.parts
    empty = manifest.adapter.model_copy(update={"parts": [part.model_copy(update={"modules": {}})]})
    other = manifest.model_copy(update={"adapter": empty})
    monkeypatch.setattr(served.registry, "read", lambda version: (other, read))
    with pytest.raises(ManifestError, match="every tensor must belong to a module of the adapter"):
        served.pinned(f"{NAME}@1")


def test_they_are_looked_at_for_every_adapter(served, monkeypatch, tmp_path):
    def refuse(manifest):
        raise ManifestError(f"looked at {manifest.full_name}")

    monkeypatch.setattr("finetune.vllm_plugin.served.require_described", refuse)
    with pytest.raises(ManifestError, match=f"looked at {NAME}"):
        served.pinned(f"{NAME}@1")
    assert not (tmp_path / "cache" / "vllm").exists()


def test_a_yanked_version_by_its_digest_warns_in_the_log(served, registry, caplog):
    wanted = f"{NAME}@sha256:{digest(registry, 1)}"
    registry.yank(f"{NAME}@1", reason="wrong labels")
    with caplog.at_level("WARNING"), warnings.catch_warnings():
        assert served.pinned(wanted) == wanted
    assert "is yanked: wrong labels" in caplog.text


def test_tensors_are_those_of_the_adapter(served, registry):
    manifest, read = registry.read(f"{NAME}@1")
    kept = load_file(served.folder(served.pinned(f"{NAME}@1")) / "adapter_model.safetensors")
    adapter = verify(manifest, read, digest="", source=Path("x"))
    for name, tensor in adapter.tensors.items():
        wanted = tensor * 4 if "lora_B" in name else tensor  # lora_alpha 16, r 4
        assert torch.equal(kept[name], wanted)
