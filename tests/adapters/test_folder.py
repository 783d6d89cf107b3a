"""What is read without being trusted: headers, JSON, and the identity of a base."""

import json
import struct

import pytest
import torch

from finetune.adapters.base_identity import file_digest, identify_base, require_same_base
from finetune.adapters.folder import check_header, read_folder, tensor_table, weights_bytes, write_folder
from finetune.adapters.probe import compare, probe_conversation, record
from finetune.adapters.strict_json import strict_json
from finetune.errors import BaseMismatchError, IntegrityError, ManifestError, ModelError, ProbeError

TENSORS = {"a.weight": torch.ones(2, 3), "b.weight": torch.zeros(4)}
TABLE = tensor_table(TENSORS)


def with_header(change):
    data = weights_bytes(TENSORS)
    length = struct.unpack("<Q", data[:8])[0]
    header = change(data[8 : 8 + length].decode())
    raw = header if isinstance(header, bytes) else header.encode()
    return struct.pack("<Q", len(raw)) + raw + data[8 + length :]


def edit(**entry):
    def change(text):
        header = json.loads(text)
        header["a.weight"] |= entry
        return json.dumps(header)

    return change


def test_a_good_header_passes_and_equal_tensors_give_equal_bytes():
    check_header(weights_bytes(TENSORS), TABLE, source="x")
    assert weights_bytes(TENSORS) == weights_bytes(dict(reversed(TENSORS.items())))


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "must be a safetensors file"),
        (b"\x80\x04\x95pickle", "must be a safetensors file"),
        (struct.pack("<Q", 1 << 60) + b"{}", "must be a safetensors file"),
        (
            with_header(lambda t: t.rstrip()[:-1] + ',"a.weight":{}}'),
            "a key must be unique, but 'a.weight' is given twice",
        ),
        (
            with_header(lambda t: t.replace("a.weight", "../a")),
            "must hold the tensors of the manifest: 1 are missing .*a.weight",
        ),
        (with_header(edit(shape=[3, 2])), "tensor a.weight must be F32 .2, 3. as in the manifest, got "),
        (with_header(edit(dtype="I64")), "tensor a.weight must be F32"),
        (with_header(edit(data_offsets=[0, 8])), r"must have dtype, shape and data_offsets .0, 24. only"),
        (with_header(edit(data_offsets=[-24, 0])), r"must have dtype, shape and data_offsets .0, 24. only"),
        (weights_bytes(TENSORS) + b"\0\0\0\0", "bytes of data that its header describes, got "),
        (weights_bytes(TENSORS)[:-4], "bytes of data that its header describes, got "),
        (with_header(lambda t: '{"a":' + "[" * 3000), "must be nested at most 32 levels deep"),
        (with_header(lambda t: "[1]"), "must be a safetensors file"),
    ],
)
def test_a_strange_header_is_refused_before_any_tensor_is_made(data, message):
    with pytest.raises(ManifestError, match=f"^x\\b.*{message}"):
        check_header(data, TABLE, source="x")


@pytest.mark.parametrize(
    ("raw", "message"),
    [
        (b'{"a": 1, "a": 2}', "a key must be unique, but 'a' is given twice"),
        (b'{"a": NaN}', "numbers must be finite, got NaN"),
        (b'{"a": 1e999}', "too large"),
        (b'"\\ud800"', "not JSON"),
        (b"[" * 100_000, "must be nested at most 32 levels deep"),
        (b"[" * 33 + b"]" * 33, "must be nested at most 32 levels deep"),
        (b"[" + b"0," * 150_000 + b"0]", "must hold at most 150000 values"),
        ('{"a": 1}'.encode("utf-16"), "not JSON"),
        ("\ufeff{}".encode(), "not JSON"),
        (b" " * 200, "must have at most 100 bytes, got 200"),
    ],
)
def test_strict_json(raw, message):
    with pytest.raises(ManifestError, match=message):
        strict_json(raw, source="x", max_bytes=100 if raw.startswith(b" ") else 10**6)


def test_a_folder_is_written_whole_or_not_at_all(tmp_path, monkeypatch):
    write_folder(tmp_path / "a", {"x": b"1"})
    monkeypatch.setattr("os.fsync", lambda fd: (_ for _ in ()).throw(OSError("disk full")))
    with pytest.raises(OSError, match="disk full"):
        write_folder(tmp_path / "a", {"x": b"2"})
    assert (tmp_path / "a" / "x").read_bytes() == b"1"
    assert [p.name for p in tmp_path.iterdir()] == ["a"]


def test_what_is_no_adapter(tmp_path):
    with pytest.raises(IntegrityError, match=r"manifest.json must be a regular file, but is missing"):
        read_folder(tmp_path)


def fake_base(folder, weights=b"w", **config):
    folder.mkdir()
    (folder / "model.safetensors").write_bytes(weights)
    (folder / "config.json").write_text(json.dumps({"model_type": "toy", "n": 1} | config))
    return identify_base(str(folder))


def test_a_base_is_its_weights_and_its_config(tmp_path):
    one, copy = fake_base(tmp_path / "a"), fake_base(tmp_path / "b", transformers_version="9")
    assert one.digest == copy.digest and one.hub_id is None
    for name, other, message in (
        ("c", {"weights": b"v"}, "model.safetensors has sha256"),
        ("d", {"n": 2}, "its config.json differs"),
        ("e", {"model_type": "toi"}, "its model_type is toi, not toy"),
    ):
        with pytest.raises(BaseMismatchError, match=message):
            require_same_base(one, fake_base(tmp_path / name, **other))
    (tmp_path / "f").mkdir()
    with pytest.raises(ModelError, match="must hold safetensors weights .model.safetensors., and does not"):
        identify_base(str(tmp_path / "f"))
    index = {"weight_map": {"a": "model-00001-of-00002.safetensors", "b": "model-00002-of-00002.safetensors"}}
    (tmp_path / "f" / "model.safetensors.index.json").write_text(json.dumps(index))
    (tmp_path / "f" / "model-00001-of-00002.safetensors").write_bytes(b"w")
    with pytest.raises(
        ModelError, match="the 2 weight files of its index, but 1 are missing, such as model-00002-of-00002.safetensors"
    ):
        identify_base(str(tmp_path / "f"))
    with pytest.raises(ModelError, match="must be a folder or a hub id whose files are all in the hub's cache"):
        identify_base("nobody/nothing")


def test_a_cached_digest_is_used_only_for_the_same_file(tmp_path):
    path = tmp_path / "w"
    path.write_bytes(b"one")
    first = file_digest(path)
    path.write_bytes(b"two!")
    assert file_digest(path) != first
    assert file_digest(path) == file_digest(path, cached=False)


def test_the_probe_compares_effects():
    base = torch.randn(4, 64, generator=torch.Generator().manual_seed(0))
    effect = torch.randn(4, 64, generator=torch.Generator().manual_seed(1))
    probe = record(base, base + effect, seed=0, dtype=torch.float32)
    assert compare(probe, base, base + effect, dtype=torch.float32).verdict == "passed"
    assert compare(probe, base + 5, base + 5 + effect * 1.01, dtype=torch.float32).verdict == "passed"
    with pytest.raises(ProbeError, match="its effect on the probe is"):
        compare(probe, base, base + effect * 1.05, dtype=torch.float32)
    assert compare(probe, base, base + effect * 1.05, dtype=torch.bfloat16).verdict == "passed"
    with pytest.raises(ProbeError):
        compare(probe, base, base * float("nan"), dtype=torch.float32)
    nothing = record(base, base + effect * 3e-6, seed=0, dtype=torch.float32)
    assert compare(nothing, base, base, dtype=torch.float32).verdict == "inconclusive"
    with pytest.raises(ProbeError, match="must have version 1, got 99"):
        compare(probe.model_copy(update={"version": 99}), base, base, dtype=torch.float32)


def test_the_probe_is_a_function_of_its_seed():
    messages, image = probe_conversation(0)
    assert image.tobytes() == probe_conversation(0)[1].tobytes() != probe_conversation(1)[1].tobytes()
    assert messages == probe_conversation(1)[0]


@pytest.mark.parametrize(
    ("saved", "live", "message"),
    [
        (
            "4bit",
            None,
            "trained on a base held in 4bit, and this base is held in full precision: .* --quantization 4bit",
        ),
        ("4bit", "8bit", "trained on a base held in 4bit, and this base is held in 8bit: .* --quantization 4bit"),
        (None, "8bit", "trained on a base held in full precision, and this base is held in 8bit: .* no --quantization"),
        ("8bit", "8bit", r"of the recorded effect\). Check the base, and the versions"),
    ],
)
def test_an_error_of_the_effect_on_another_dtype_or_quantization_names_the_trained_one(saved, live, message):
    base, effect = torch.zeros(4, 64), torch.ones(4, 64)
    probe = record(base, base + effect, seed=1, dtype=torch.float32, quantization=saved)
    with pytest.raises(ProbeError, match=message):
        compare(probe, base, base - effect, dtype=torch.float32, quantization=live)
