"""Weights that are no safetensors file, or not the one that the manifest describes, or hold no numbers to use."""

import json
import struct

import pytest
import torch

from finetune.errors import IntegrityError, ManifestError, ProbeError
from tests.safety.forging import Case, Forgery, names

_NOT_FINITE = "the values of tensor .* must be finite, got NaN or infinity"
_NO_FILE = "must be a safetensors file"
_NEXT = "must have dtype, shape and data_offsets"


def raw(data: bytes):
    def forge(forgery: Forgery) -> None:
        forgery.weights = data

    return forge


def header(change):
    return lambda forgery: forgery.header(change)


def header_bytes(change):
    return lambda forgery: forgery.header_bytes(change)


def whole(change):
    """Changes the bytes of the file."""

    def forge(forgery: Forgery) -> None:
        forgery.weights = change(forgery.plain_weights())

    return forge


def first(**entry):
    """Changes the header's entry of its first tensor."""
    return header(lambda parsed: parsed[_names(parsed)[0]].update(entry))


def _names(parsed) -> list[str]:
    return sorted((name for name in parsed if name != "__metadata__"), key=lambda name: parsed[name]["data_offsets"])


def overlap(parsed) -> None:
    one, two = _names(parsed)[:2]
    parsed[two]["data_offsets"] = parsed[one]["data_offsets"]


def hole(forgery: Forgery) -> None:
    def shift(parsed) -> None:
        for name in _names(parsed)[1:]:
            parsed[name]["data_offsets"] = [offset + 64 for offset in parsed[name]["data_offsets"]]

    forgery.header(shift)
    forgery.weights += bytes(64)


def add(name: str, **entry):
    return header(lambda parsed: parsed.update({name: {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]} | entry}))


def integers_written_otherwise(write):
    def change(parsed) -> None:
        entry = parsed[_names(parsed)[0]]
        entry["shape"] = [write(n) for n in entry["shape"]]

    return header(change)


def twice(text: bytes) -> bytes:
    name = _names(json.loads(text))[0]
    return text.rstrip()[:-1] + f',"{name}":{{"dtype":"F32","shape":[1],"data_offsets":[0,4]}}}}'.encode()


def many(parsed) -> None:
    parsed.update({f"t{i}": {"dtype": "F32", "shape": [0], "data_offsets": [0, 0]} for i in range(200_000)})


def metadata(value):
    return header(lambda parsed: parsed.update(__metadata__=value))


def listed(change):
    """Changes tensors, and the manifest's table with them."""

    def forge(forgery: Forgery) -> None:
        change(forgery)
        forgery.list_tensors()

    return forge


def all_tensors(change):
    def forge(forgery: Forgery) -> None:
        forgery.tensors = {name: change(name, tensor.clone()) for name, tensor in forgery.tensors.items()}

    return forge


def one_value(value: float):
    def change(name, tensor):
        tensor.view(-1)[-1] = value
        return tensor

    return all_tensors(change)


def half(forgery: Forgery) -> None:
    forgery.tensors = dict(list(forgery.tensors.items())[::2])


def one_more(forgery: Forgery) -> None:
    forgery.tensors["lm_head.weight"] = torch.zeros(4, 4)


def large(forgery: Forgery) -> None:
    """Far larger than all other data in memory, so that a third copy of it is detected."""
    forgery.tensors["lm_head.weight"] = torch.ones(24 * 2**20)


def table(**entry):
    """Changes the manifest's entry of a tensor."""

    def forge(forgery: Forgery) -> None:
        next(iter(forgery.adapter["tensors"].values())).update(entry)

    return forge


HEADERS = [
    ("nothing", raw(b""), _NO_FILE),
    ("seven bytes", raw(b"1234567"), _NO_FILE),
    ("a length below zero", whole(lambda data: struct.pack("<q", -1) + data[8:]), _NO_FILE),
    ("a length of 2^60", whole(lambda data: struct.pack("<Q", 1 << 60) + data[8:]), _NO_FILE),
    ("a length beyond the end", whole(lambda data: struct.pack("<Q", len(data)) + data[8:]), _NO_FILE),
    ("a header of 5 MB", header_bytes(lambda text: text + b" " * 5 * 2**20), _NO_FILE),
    ("50 MB of metadata", metadata({"x": "y" * 50 * 2**20}), _NO_FILE),
    ("200,000 tensors", header(many), _NO_FILE),
    (
        "20,000 empty tensors",
        header_bytes(lambda text: b'{"a":' + b"[]," * 300_000 + b"1}"),
        "must hold at most 150000 values",
    ),
    ("cut", whole(lambda data: data[:-100]), "bytes of data that its header describes, got"),
    ("one byte more", whole(lambda data: data + b"\0"), "bytes of data that its header describes, got"),
    (
        "a pickle behind it",
        whole(lambda data: data + b"cos\nsystem\n(S'touch canary'\ntR."),
        "that its header describes, got",
    ),
    ("no JSON", header_bytes(lambda text: b"{" + text), "not JSON"),
    ("a list", header_bytes(lambda text: b"[" + text + b"]"), _NO_FILE),
    (
        "10,000 levels",
        header_bytes(lambda text: b'{"a":' + b"[" * 10_000 + b"]" * 10_000 + b"}"),
        "must be nested at most 32 levels",
    ),
    ("no UTF-8", header_bytes(lambda text: text.replace(b"lora_A", b"lora_\xff", 1)), "not JSON"),
    ("UTF-16", header_bytes(lambda text: text.decode().encode("utf-16")), _NO_FILE),
    ("a byte order mark", header_bytes(lambda text: b"\xef\xbb\xbf" + text), _NO_FILE),
    ("a blank before it", header_bytes(lambda text: b" " + text), _NO_FILE),
    ("a key twice", header_bytes(twice), "a key must be unique, but 'base_model.model.*' is given twice"),
    ("metadata twice", header_bytes(lambda text: text.rstrip()[:-1] + b',"__metadata__":{}}'), "is given twice"),
    ("metadata that is no text", metadata({"x": 1}), "__metadata__ must map names to texts, got .'x': 1."),
    ("metadata that is no object", metadata([1]), "__metadata__ must map names to texts, got .1."),
    ("overlap", header(overlap), _NEXT),
    ("a hole", hole, _NEXT),
    ("offsets below zero", first(data_offsets=[-256, 0]), _NEXT),
    ("offsets backwards", first(data_offsets=[256, 0]), _NEXT),
    ("offsets that overflow", first(data_offsets=[0, 2**64 + 256]), _NEXT),
    ("offsets that are no integers", first(data_offsets=[0.0, 1024.0]), _NEXT),
    ("offsets that are true", first(data_offsets=[False, True]), _NEXT),
    ("three offsets", first(data_offsets=[0, 1, 2]), _NEXT),
    ("no offsets", first(data_offsets=None), _NEXT),
    ("a field more", first(code="import os"), _NEXT),
    ("no shape", first(shape=None), "as in the manifest"),
    ("a shape that overflows", first(shape=[2**40, 2**40]), "as in the manifest"),
    ("a shape below zero", first(shape=[-4, -64]), "as in the manifest"),
    ("a shape without values", first(shape=[0, 64]), "as in the manifest"),
    ("a shape of fractions", integers_written_otherwise(float), "as in the manifest"),
    ("a shape of texts", integers_written_otherwise(str), "as in the manifest"),
    ("an unknown dtype", first(dtype="F128"), "as in the manifest"),
    ("F64", first(dtype="F64"), "as in the manifest"),
    ("I8", first(dtype="I8"), "as in the manifest"),
    ("a dtype in small letters", first(dtype="f32"), "as in the manifest"),
    ("a dtype that is a list", first(dtype=["F32"]), "as in the manifest"),
    ("an entry that is no object", header(lambda parsed: parsed.update({_names(parsed)[0]: 7})), "as in the manifest"),
    ("a name that leads up", add("../../x"), "1 are not in the manifest .*'../../x'"),
    ("an absolute name", add("/etc/passwd"), "1 are not in the manifest .*'/etc/passwd'"),
    ("a name of a megabyte", add("x" * 2**20), "1 are not in the manifest .*'xxx"),
    ("a name for a terminal", add("\x1b[2J\u202e"), "1 are not in the manifest"),
    ("an empty tensor more", add("empty", shape=[0], data_offsets=[0, 0]), "1 are not in the manifest .*'empty'"),
]
TABLES = [
    ("a shape that overflows", table(shape=[2**31] * 8), "as in the manifest"),
    ("a number below one", table(shape=[0, 4]), "greater than or equal to 1"),
    ("a shape below zero", table(shape=[-1, 4]), "greater than or equal to 1"),
    ("a shape of 1e12", table(shape=[10**12]), "less than or equal to 2147483648"),
    ("a shape that is true", table(shape=[True, 4]), "Input should be a valid integer"),
    ("a thousand dimensions", table(shape=[1] * 1000), "at most 8 items"),
    ("F64", table(dtype="F64"), "Input should be 'F32', 'F16' or 'BF16'"),
    ("no tensors", lambda forgery: forgery.adapter.update(tensors={}), "at least 1 item"),
    (
        "a name that leads up",
        lambda forgery: forgery.adapter["tensors"].update({"../x": {"shape": [1], "dtype": "F32"}}),
        r"tensors.../x.\[key\]: String should match pattern",
    ),
    (
        "100,000 tensors",
        lambda forgery: forgery.adapter["tensors"].update(
            {f"t{i}": {"shape": [], "dtype": "F32"} for i in range(100_000)}
        ),
        "must hold at most 150000 values|at most 20000 items",
    ),
]
VALUES = [
    ("half of the tensors", half, ManifestError, "must hold the tensors of the manifest: .* are missing"),
    (
        "half of the tensors and of the table",
        listed(half),
        ManifestError,
        "tensors must be those of its modules on this base",
    ),
    ("one tensor more", listed(one_more), ManifestError, "1 unknown .lm_head.weight"),
    ("96 MB more", listed(large), ManifestError, "1 unknown .lm_head.weight"),
    (
        "renamed",
        lambda f: f.rename("lora_A", "lora_Z", everywhere=False),
        ManifestError,
        "are missing .*lora_A",
    ),
    ("renamed in the table too", lambda f: f.rename("lora_A", "lora_Z"), ManifestError, "28 unknown|unknown .*lora_Z"),
    ("NaN", one_value(float("nan")), IntegrityError, _NOT_FINITE),
    ("infinite", one_value(float("inf")), IntegrityError, _NOT_FINITE),
    ("below all numbers", one_value(float("-inf")), IntegrityError, _NOT_FINITE),
    (
        "infinite in half precision",
        listed(all_tensors(lambda name, tensor: torch.full_like(tensor, float("inf")).half())),
        IntegrityError,
        _NOT_FINITE,
    ),
    (
        "the largest numbers",
        all_tensors(lambda n, t: torch.full_like(t, 3e38)),
        ProbeError,
        "must have the effect that it had",
    ),
    ("no effect", all_tensors(lambda name, tensor: torch.zeros_like(tensor)), ProbeError, "effect on the probe is 0"),
    (
        "signs turned",
        all_tensors(lambda n, t: -t if "lora_A" in n else t),
        ProbeError,
        "must have the effect that it had",
    ),
    ("the layers swapped", lambda f: swap_layers(f), ProbeError, "must have the effect that it had"),
    (
        "transposed",
        listed(all_tensors(lambda n, t: t.T.contiguous())),
        ManifestError,
        "must have the shape .* on this base, got",
    ),
    (
        "of a narrower base",
        listed(all_tensors(lambda n, t: (t[:, :8] if "lora_A" in n else t[:8]).contiguous())),
        ManifestError,
        "must have the shape .* on this base, got",
    ),
    (
        "of a wider base",
        listed(all_tensors(lambda n, t: torch.cat([t, t]))),
        ManifestError,
        "must have the shape .* on this base, got",
    ),
]


def swap_layers(forgery: Forgery) -> None:
    other = {"0": "1", "1": "0"}

    def swapped(name: str) -> str:
        before, layers, after = name.partition(".language_model.layers.")
        return f"{before}{layers}{other[after[0]]}{after[1:]}" if layers else name

    forgery.tensors = {swapped(name): tensor for name, tensor in forgery.tensors.items()}


CASES = [
    *(Case(f"header: {name}", forge, ManifestError, message) for name, forge, message in HEADERS),
    *(Case(f"table: {name}", forge, ManifestError, message) for name, forge, message in TABLES),
    *(Case(name, forge, error, message) for name, forge, error, message in VALUES),
]


@pytest.mark.parametrize("case", CASES, ids=names)
def test_weights_are_refused(refused, case):
    refused(case)
