"""A probe that passed here leaves a receipt; nothing else is skipped for it, and a bad one is as none."""

import shutil
from dataclasses import replace

import pytest
import torch

from finetune.adapters.folder import file_entries, read_folder, weights_bytes
from finetune.adapters.manifest import CONFIG_NAME, MANIFEST_NAME, WEIGHTS_NAME, AdapterManifest
from finetune.assemble.base import Base
from finetune.assemble.loading import load_base
from finetune.core.cache import cache_home, write_note
from finetune.errors import IntegrityError, ManifestError, ProbeError
from finetune.serving.receipts import find_base_values
from finetune.serving.vision_language_model import VisionLanguageModel
from tests.serving.adapters import make_adapter


@pytest.fixture(scope="module")
def saved(tiny_fast_vlm, tmp_path_factory):
    """A base and an adapter's folder."""
    base = load_base(str(tiny_fast_vlm), device="cpu")
    return base, make_adapter(base, "lora", tmp_path_factory.mktemp("saved") / "lora")


@pytest.fixture
def probes(monkeypatch):
    """Count how often the probe's row goes through a model."""
    runs = []
    probe = Base.probe
    monkeypatch.setattr(Base, "probe", lambda self, *args: runs.append(1) or probe(self, *args))
    return runs


def receipts():
    return sorted((cache_home() / "probes").glob("*.json"))


def base_notes():
    return sorted((cache_home() / "base-probes").glob("*.json"))


def test_the_second_load_does_not_probe(saved, probes):
    base, folder = saved
    first = VisionLanguageModel(base).add(folder)
    assert len(probes) == 2 and len(receipts()) == 1
    again = VisionLanguageModel(base).add(folder)
    assert len(probes) == 2 and again.probe == first.probe


@pytest.mark.parametrize(
    "text",
    [
        "",
        "{",
        "[]",
        "{}",
        '{"verdict": "failed", "difference": 0.0}',
        '{"verdict": "passed"}',
        '{"verdict": "passed", "difference": "0"}',
        "\udcff",
    ],
)
def test_an_invalid_receipt_is_as_none(saved, probes, text):
    base, folder = saved
    VisionLanguageModel(base).add(folder)
    (receipt,) = receipts()
    right = receipt.read_bytes()
    receipt.write_bytes(text.encode(errors="surrogateescape"))
    VisionLanguageModel(base).add(folder)
    assert len(probes) == 3 and receipt.read_bytes() == right  # the base's own values are known


def test_adapters_of_one_base_share_its_values(saved, probes, tmp_path):
    base, folder = saved
    another = make_adapter(load_base(base.path, device="cpu"), "lora", tmp_path / "another", seed=1)
    probes.clear()
    VisionLanguageModel(base).add(folder)
    VisionLanguageModel(base).add(another)
    assert len(probes) == 3 and len(receipts()) == 2


@pytest.mark.parametrize(
    "text", ["", "null", "[]", "[[1.0, [2.0]]]", "[[1.0], [2.0, 3.0]]", "[[NaN]]", "[[0.0, 0.0]]", "7"]
)
def test_no_note_of_a_base_refuses_an_adapter(saved, probes, text):
    base, folder = saved
    first = VisionLanguageModel(base).add(folder)
    (note,) = base_notes()
    right = note.read_text()
    receipts()[0].unlink()
    write_note(note, text)
    assert VisionLanguageModel(base).add(folder).probe == first.probe
    assert len(probes) == 4 and note.read_text() == right


def test_another_processor_has_values_of_its_own(saved, probes):
    base, folder = saved
    VisionLanguageModel(base).add(folder)
    digests = base.digests.model_copy(update={"chat_template": "0" * 64})
    assert find_base_values(base, 0) is not None
    assert find_base_values(replace(base, digests=digests), 0) is None and find_base_values(base, 1) is None


def test_another_dtype_or_version_is_probed_anew(saved, probes, monkeypatch):
    base, folder = saved
    VisionLanguageModel(base).add(folder)
    VisionLanguageModel(load_base(base.path, device="cpu", dtype="bfloat16")).add(folder)
    assert len(probes) == 4
    monkeypatch.setattr("finetune.serving.receipts._versions", lambda: ["0", "0", "0"])
    VisionLanguageModel(base).add(folder)
    assert len(probes) == 6 and len(receipts()) == 3


def test_what_fails_leaves_no_receipt(saved, probes, tmp_path):
    base, folder = saved
    good = read_folder(folder)
    bad = tmp_path / "bad"
    shutil.copytree(folder, bad)
    weights = weights_bytes({name: torch.zeros_like(tensor) for name, tensor in good.tensors.items()})
    entries = file_entries(weights, (folder / CONFIG_NAME).read_bytes())
    data = good.manifest.model_dump() | {"files": {name: entry.model_dump() for name, entry in entries.items()}}
    (bad / WEIGHTS_NAME).write_bytes(weights)
    (bad / MANIFEST_NAME).write_bytes(AdapterManifest.model_validate(data).to_bytes())
    for _ in range(2):
        with pytest.raises(ProbeError, match="its effect on the probe is 0"):
            VisionLanguageModel(base).add(bad)
    assert receipts() == [] and len(probes) == 4  # the base itself decides, and not its note


@pytest.mark.parametrize("damage", ["a byte", "the end", "the config"])
def test_a_receipt_lets_no_other_bytes_pass(saved, tmp_path, damage):
    base, folder = saved
    VisionLanguageModel(base).add(folder)
    bad = tmp_path / "bad"
    shutil.copytree(folder, bad)
    name = CONFIG_NAME if damage == "the config" else WEIGHTS_NAME
    data = bytearray((bad / name).read_bytes())
    if damage == "the end":
        del data[-4:]
    else:
        data[-5] ^= 1
    (bad / name).write_bytes(data)
    with pytest.raises((IntegrityError, ManifestError), match="must be the file that the manifest lists"):
        VisionLanguageModel(base).add(bad)
