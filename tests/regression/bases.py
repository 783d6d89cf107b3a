"""Tiny bases that are the same bytes for ever: their small files are stored, their weights are computed.

A stored base is a folder of small files (config, processor, tokenizer) and ``weights.json``, one tensor a line. Each
tensor is filled from SHAKE-256 of its name, a standard that no release of torch, numpy or safetensors can change, by
float32 products and sums that IEEE 754 rounds in one way only. So nothing here asks torch or transformers.
"""

import hashlib
import json
import shutil
from pathlib import Path

import numpy as np

TABLE = "weights.json"
WEIGHTS = "model.safetensors"
# What safetensors calls them; a base holds integers only as counters.
_DTYPES = {"F32": np.dtype("<f4"), "I64": np.dtype("<i8")}


def build_base(stored: Path, folder: Path) -> Path:
    """Return ``folder``, made into a base that transformers can load, from the ``stored`` one."""
    folder.mkdir(parents=True)
    for path in stored.iterdir():
        if path.name != TABLE:
            shutil.copyfile(path, folder / path.name)
    table = json.loads((stored / TABLE).read_text(encoding="utf-8"))
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    parts, offset = [], 0
    for name, entry in table.items():
        data = fill(name, **entry).tobytes()
        span = [offset, offset + len(data)]
        header[name] = {"dtype": entry["dtype"], "shape": entry["shape"], "data_offsets": span}
        parts.append(data)
        offset += len(data)
    head = json.dumps(header, separators=(",", ":")).encode()
    head += b" " * (-len(head) % 8)  # the tensors are aligned to 8 bytes
    (folder / WEIGHTS).write_bytes(len(head).to_bytes(8, "little") + head + b"".join(parts))
    return folder


def fill(name: str, *, dtype: str, shape: list[int], center: float, spread: float) -> np.ndarray:
    """Return the tensor ``name``: values from ``center - spread`` up to ``center + spread``.

    Args:
        name: the seed.
        dtype: ``F32``, or ``I64`` for ``center`` throughout.
        shape: of the tensor.
        center: the middle of its values; float32 holds it exactly.
        spread: how far they reach; float32 holds it exactly.
    """
    if dtype != "F32":
        return np.full(shape, int(center), _DTYPES[dtype])
    count = int(np.prod(shape, dtype=np.int64))
    raw = np.frombuffer(hashlib.shake_256(name.encode()).digest(4 * count), "<u4")
    unit = (raw >> 8).astype("<f4") * np.float32(2**-23) - np.float32(1)  # exact: 24 bits, in [-1, 1)
    return (unit * np.float32(spread) + np.float32(center)).reshape(shape)


def store_base(folder: Path, stored: Path) -> None:
    """Store a base that transformers saved: its small files, and what its weights are to be filled with.

    Weights of the usual 0.02 let the features of so small a model vanish, so they are as large as ReLU's want them.
    """
    from safetensors.numpy import load_file

    stored.mkdir(parents=True)
    for path in sorted(folder.iterdir()):
        if path.name != WEIGHTS:
            shutil.copyfile(path, stored / path.name)
    lines = []
    for name, tensor in sorted(load_file(folder / WEIGHTS).items()):
        center, spread = 0.0, float(np.float32((6 / max(1, tensor[0].size)) ** 0.5)) if tensor.ndim > 1 else 0.0
        if tensor.ndim < 2:  # norms, biases, running statistics: near the constant that they begin with
            constant = tensor.size and (tensor == tensor.flat[0]).all()
            center, spread = (float(tensor.flat[0]), 0.125) if constant else (0.0, 0.125)
        kind = "I64" if tensor.dtype == np.int64 else "F32"
        entry = {"dtype": kind, "shape": list(tensor.shape), "center": center, "spread": spread}
        lines.append(f"{json.dumps(name)}: {json.dumps(entry)}")
    (stored / TABLE).write_text("{\n" + ",\n".join(lines) + "\n}\n", encoding="utf-8")
