"""An adapter's folder: PEFT's two files and a manifest. Written whole or not at all; read without trusting it."""

from __future__ import annotations

import json
import os
import shutil
import struct
import tempfile
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load as parse_safetensors
from safetensors.torch import save as to_safetensors

from finetune.adapters.manifest import (
    CONFIG_NAME,
    MANIFEST_NAME,
    MAX_MANIFEST_BYTES,
    WEIGHTS_NAME,
    AdapterManifest,
    FileEntry,
    TensorEntry,
    sha256_hex,
)
from finetune.adapters.peft_format import peft_config, peft_type
from finetune.adapters.strict_json import canonical_json, strict_json
from finetune.errors import IntegrityError, ManifestError, brief, plain

if TYPE_CHECKING:
    from collections.abc import Mapping

    from torch import Tensor

MAX_WEIGHTS_BYTES = 8 * 1024**3
MAX_CONFIG_BYTES = 4 * 1024**2
MAX_HEADER_BYTES = 4 * 1024**2
_PIECE = 2**20  # values
_DTYPES = {torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16"}
_BYTES = {"F32": 4, "F16": 2, "BF16": 2}


@dataclass(frozen=True)
class AdapterFolder:
    """A verified folder: the manifest and tensors it describes, bytes equal to their digests."""

    path: Path
    manifest: AdapterManifest
    tensors: dict[str, Tensor]


def tensor_table(tensors: Mapping[str, Tensor]) -> dict[str, TensorEntry]:
    """Returns the manifest's table of ``tensors``."""
    return {
        name: TensorEntry(shape=list(tensor.shape), dtype=_DTYPES[tensor.dtype])  # type: ignore[arg-type]
        for name, tensor in sorted(tensors.items())
    }


def weights_bytes(tensors: Mapping[str, Tensor]) -> bytes:
    """Returns the safetensors file of ``tensors``; equal tensors give equal bytes."""
    plain = {name: tensors[name].detach().cpu().contiguous() for name in sorted(tensors)}
    return to_safetensors(plain, metadata={"format": "pt"})


def config_bytes(config: Mapping[str, Any]) -> bytes:
    """Returns the bytes of ``adapter_config.json``."""
    return (json.dumps(config, indent=2, sort_keys=True) + "\n").encode()


def file_entries(weights: bytes, config: bytes) -> dict[str, FileEntry]:
    """Returns the manifest's table of files."""
    return {
        WEIGHTS_NAME: FileEntry(sha256=sha256_hex(weights), size=len(weights)),
        CONFIG_NAME: FileEntry(sha256=sha256_hex(config), size=len(config)),
    }


def write_folder(folder: Path, files: Mapping[str, bytes]) -> None:
    """Writes ``files`` into ``folder``, replacing it; nothing half-written is ever visible under that name."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    aside = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
    try:
        for name, data in files.items():
            with (aside / name).open("wb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
        aside.chmod(0o755)
        if folder.exists():
            old = aside.with_name(f"{aside.name}-old")
            os.replace(folder, old)
            try:
                os.replace(aside, folder)
            except BaseException:
                os.replace(old, folder)
                raise
            shutil.rmtree(old)
        else:
            os.replace(aside, folder)
    except BaseException:
        shutil.rmtree(aside, ignore_errors=True)
        raise


def read_folder(path: Path) -> AdapterFolder:
    """Reads and verifies an adapter's folder.

    Sizes are checked before bytes are read, digests before anything is parsed, the header before tensors exist.

    Raises:
        ManifestError: manifest, config or header break their schema.
        IntegrityError: a file is missing or not the one the manifest lists.
    """
    manifest = AdapterManifest.parse(_read(path / MANIFEST_NAME, MAX_MANIFEST_BYTES), source=str(path / MANIFEST_NAME))
    raw = {}
    for name, cap in ((WEIGHTS_NAME, MAX_WEIGHTS_BYTES), (CONFIG_NAME, MAX_CONFIG_BYTES)):
        entry, data = manifest.files[name], _read(path / name, cap)
        if len(data) != entry.size or sha256_hex(data) != entry.sha256:
            raise IntegrityError(
                f"{path / name}: not the file that was saved (sha256 {sha256_hex(data)[:16]}..., {len(data)} bytes; "
                f"the manifest lists {entry.sha256[:16]}..., {entry.size} bytes). Pull it again."
            )
        raw[name] = data
    _check_config(manifest, raw[CONFIG_NAME], path / CONFIG_NAME)
    check_header(raw[WEIGHTS_NAME], manifest.adapter.tensors, source=str(path / WEIGHTS_NAME))
    try:
        tensors = parse_safetensors(raw[WEIGHTS_NAME])
    except SafetensorError as error:
        raise ManifestError(f"{path / WEIGHTS_NAME}: not a safetensors file: {brief(str(error), 200)}") from None
    for name, tensor in tensors.items():
        # In pieces: what is compared takes twice the room of what it is made from.
        if not all(bool(torch.isfinite(piece).all()) for piece in tensor.flatten().split(_PIECE)):
            raise IntegrityError(f"{path / WEIGHTS_NAME}: {name} holds values that are not finite")
    return AdapterFolder(path, manifest, tensors)


def check_header(data: bytes, table: Mapping[str, TensorEntry], *, source: str) -> None:
    """Checks a safetensors header, before any tensor is made, against the manifest's table.

    Raises:
        ManifestError: duplicate or strange keys, or a tensor that the table does not list just so.
    """
    length = struct.unpack("<Q", data[:8])[0] if len(data) >= 8 else 0
    if not 2 <= length <= min(MAX_HEADER_BYTES, len(data) - 8) or data[8:9] != b"{":
        raise ManifestError(f"{source}: not a safetensors file (header of {length} bytes)")
    header = strict_json(data[8 : 8 + length], source=source, max_bytes=MAX_HEADER_BYTES)
    header.pop("__metadata__", None)  # nothing here reads it
    missing, extra = sorted(set(table) - set(header)), sorted(set(header) - set(table))
    if missing or extra:
        raise ManifestError(
            f"{source}: {len(missing)} of the manifest's tensors are missing ({brief(missing[:3], 300)}) and "
            f"{len(extra)} are not in it ({brief(extra[:3], 300)})"
        )
    end = 0
    for name, entry in sorted(header.items(), key=lambda item: _begin(item[1])):
        wanted = table[name]
        fits = (
            isinstance(entry, dict) and entry.get("dtype") == wanted.dtype and _same(entry.get("shape"), wanted.shape)
        )
        if not fits:
            raise ManifestError(
                f"{source}: {name} is {brief(entry)}, not {wanted.dtype} {wanted.shape} as in the manifest"
            )
        begin, end = end, end + _BYTES[wanted.dtype] * prod(wanted.shape)
        if len(entry) != 3 or not _same(entry.get("data_offsets"), [begin, end]):
            raise ManifestError(f"{source}: the bytes of {name} do not follow those before it: {brief(entry)}")
    if end != len(data) - 8 - length:
        raise ManifestError(f"{source}: {len(data) - 8 - length} bytes of data, its header accounts for {end}")


def _begin(entry: Any) -> int:
    offsets = entry.get("data_offsets") if isinstance(entry, dict) else None
    return offsets[0] if isinstance(offsets, list) and offsets and type(offsets[0]) is int else -1


def _same(numbers: Any, wanted: list[int]) -> bool:
    """Tells whether these are the same numbers, and written so: Python holds True and 1.0 for 1."""
    return isinstance(numbers, list) and numbers == wanted and all(type(number) is int for number in numbers)


def _check_config(manifest: AdapterManifest, raw: bytes, path: Path) -> None:
    """The config that PEFT would read says what the manifest says, field by field."""
    config = strict_json(raw, source=str(path), max_bytes=MAX_CONFIG_BYTES)
    if not isinstance(config, dict):
        raise ManifestError(f"{path}: not an object")
    methods = [part.method for part in manifest.adapter.parts]
    if manifest.adapter.peft_type != (right := peft_type(methods, model_type=manifest.base.model_type)):
        raise ManifestError(
            f"{path.with_name(MANIFEST_NAME)}: peft_type is {brief(manifest.adapter.peft_type)}, for "
            f"{manifest.adapter.methods} on {manifest.base.model_type} it must be {right!r}"
        )
    try:
        wanted = peft_config(manifest.adapter)
    except (KeyError, TypeError) as error:
        raise ManifestError(f"{path.with_name(MANIFEST_NAME)}: the options of the adapter lack {error}") from None
    for field, value in wanted.items():
        if canonical_json(config.get(field)) != canonical_json(value):
            raise ManifestError(f"{path}: {field} is {brief(config.get(field))}, it must be {brief(value)}")
    if unknown := sorted(set(config) - set(wanted)):
        raise ManifestError(f"{path}: fields that are not allowed: {', '.join(map(plain, unknown[:5]))}")


def _read(path: Path, cap: int) -> bytes:
    try:
        if path.is_symlink() or not path.is_file():
            raise IntegrityError(
                f"{path}: missing, or not a plain file. A finished training run writes {MANIFEST_NAME}, {CONFIG_NAME} "
                f"and {WEIGHTS_NAME} into one folder; nothing else is loaded."
            )
        if (size := path.stat().st_size) > cap:
            raise IntegrityError(f"{path}: {size} bytes; at most {cap} are allowed")
        return path.read_bytes()
    except OSError as error:
        raise IntegrityError(f"{path}: cannot be read: {error.strerror}") from None
