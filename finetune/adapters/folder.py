"""An adapter's folder: PEFT's two files and a manifest. A write is atomic; a read trusts no byte."""

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
from finetune.adapters.tensors import DTYPES, tensors_of
from finetune.core import lfs
from finetune.core.old_names import ADAPTER_CONFIG, current_names
from finetune.core.regular_file import open_regular
from finetune.errors import IntegrityError, ManifestError, brief, plain

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    import torch
    from torch import Tensor

MAX_WEIGHTS_BYTES = 8 * 1024**3
MAX_CONFIG_BYTES = 4 * 1024**2
MAX_HEADER_BYTES = 4 * 1024**2
_CAPS = {WEIGHTS_NAME: MAX_WEIGHTS_BYTES, CONFIG_NAME: MAX_CONFIG_BYTES}
_BYTES = {"F32": 4, "F16": 2, "BF16": 2}


@dataclass(frozen=True)
class AdapterFolder:
    """A verified folder: the manifest, and the tensors that it describes, whose bytes equal their digests."""

    manifest: AdapterManifest
    digest: str  # SHA-256 of the manifest's bytes
    tensors: dict[str, Tensor]


def tensor_table(tensors: Mapping[str, Tensor]) -> dict[str, TensorEntry]:
    """Return the manifest's table of ``tensors``."""
    return {
        name: TensorEntry(shape=list(tensor.shape), dtype=DTYPES[tensor.dtype])  # type: ignore[arg-type]
        for name, tensor in sorted(tensors.items())
    }


def weights_bytes(tensors: Mapping[str, Tensor]) -> bytes:
    """Return the safetensors file of ``tensors``; equal tensors give equal bytes."""
    plain = {name: tensors[name].detach().cpu().contiguous() for name in sorted(tensors)}
    return to_safetensors(plain, metadata={"format": "pt"})


def config_bytes(config: Mapping[str, Any]) -> bytes:
    """Return the bytes of ``adapter_config.json``."""
    return (json.dumps(config, indent=2, sort_keys=True) + "\n").encode()


def file_entries(weights: bytes, config: bytes) -> dict[str, FileEntry]:
    """Return the manifest's table of files."""
    return {
        WEIGHTS_NAME: FileEntry(sha256=sha256_hex(weights), size=len(weights)),
        CONFIG_NAME: FileEntry(sha256=sha256_hex(config), size=len(config)),
    }


def write_folder(folder: Path, files: Mapping[str, bytes]) -> None:
    """Replace ``folder`` by one with ``files``; readers never see a partial folder under that name."""
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


def read_folder(path: Path, *, device: torch.device | str = "cpu") -> AdapterFolder:
    """Read and verify an adapter's folder.

    Sizes are checked before bytes are read, digests before anything is parsed, the header before tensors exist.

    Args:
        path: the folder to read.
        device: the device of the tensors.

    Raises:
        ManifestError: manifest, config or header break their schema.
        IntegrityError: a file is missing, or differs from the one that the manifest lists.
    """
    raw = _read(path / MANIFEST_NAME, MAX_MANIFEST_BYTES)
    if lfs.is_pointer(raw):
        raise IntegrityError(f"{path / MANIFEST_NAME}: {lfs.WAY_OUT}")
    manifest = AdapterManifest.parse(raw, source=str(path / MANIFEST_NAME))

    def read(name: str) -> bytes:
        entry, data = manifest.files[name], _read(path / name, _CAPS[name])
        if (found := sha256_hex(data)) != entry.sha256 or len(data) != entry.size:
            if lfs.is_pointer(data):
                raise IntegrityError(f"{path / name}: {lfs.WAY_OUT}")
            raise IntegrityError(
                f"{path / name} must be the file that the manifest lists (sha256 {entry.sha256[:16]}..., {entry.size} "
                f"bytes), got sha256 {found[:16]}..., {len(data)} bytes. Pull the adapter again."
            )
        return data

    return verify(manifest, read, digest=sha256_hex(raw), source=path, device=device)


def verify(
    manifest: AdapterManifest,
    read: Callable[[str], bytes],
    *,
    digest: str,
    source: Path,
    device: torch.device | str = "cpu",
) -> AdapterFolder:
    """Check that all files of an adapter agree with its manifest, and return the adapter.

    Args:
        manifest: the manifest of the adapter.
        read: the function that returns the bytes of a listed file, with the size and digest in the manifest.
        digest: the digest of the manifest's bytes.
        source: the folder, for errors.
        device: the device of the tensors.

    Raises:
        ManifestError: config or header break their schema.
        IntegrityError: a file is too large, or a tensor holds values that are not finite.
    """
    raw = {}
    for name, cap in _CAPS.items():
        if (size := manifest.files[name].size) > cap:
            raise IntegrityError(f"{source / name} must have at most {cap} bytes, but the manifest lists {size} bytes")
        raw[name] = read(name)
    _check_config(manifest, raw[CONFIG_NAME], source / CONFIG_NAME)
    weights, where = raw[WEIGHTS_NAME], str(source / WEIGHTS_NAME)
    offsets = check_header(weights, manifest.adapter.tensors, source=where)
    tensors = tensors_of(weights, manifest.adapter.tensors, offsets, source=where, device=device)
    return AdapterFolder(manifest, digest, tensors)


def check_header(data: bytes, table: Mapping[str, TensorEntry], *, source: str) -> dict[str, int]:
    """Check a safetensors header against the manifest's table, before any tensor is made.

    Args:
        data: the bytes of the file.
        table: the shape and dtype of each tensor, from the manifest.
        source: the name of the file in errors.

    Returns:
        Name of each tensor -> its first byte in ``data``, in the order of the file.

    Raises:
        ManifestError: the header has unknown or duplicate keys, or differs from the table.
    """
    length = struct.unpack("<Q", data[:8])[0] if len(data) >= 8 else 0
    if not 2 <= length <= min(MAX_HEADER_BYTES, len(data) - 8) or data[8:9] != b"{":
        raise ManifestError(f"{source} must be a safetensors file, got a header of {length} bytes")
    header = strict_json(data[8 : 8 + length], source=source, max_bytes=MAX_HEADER_BYTES)
    metadata = header.pop("__metadata__", {})  # unused here, but other readers may use it
    if not isinstance(metadata, dict) or not all(isinstance(text, str) for text in metadata.values()):
        raise ManifestError(f"{source}: __metadata__ must map names to texts, got {brief(metadata)}")
    missing, extra = sorted(set(table) - set(header)), sorted(set(header) - set(table))
    if missing or extra:
        raise ManifestError(
            f"{source} must hold the tensors of the manifest: {len(missing)} are missing ({brief(missing[:3], 300)}) "
            f"and {len(extra)} are not in the manifest ({brief(extra[:3], 300)})"
        )
    end, offsets = 0, {}
    for name, entry in sorted(header.items(), key=lambda item: _begin(item[1])):
        wanted = table[name]
        fits = (
            isinstance(entry, dict) and entry.get("dtype") == wanted.dtype and _same(entry.get("shape"), wanted.shape)
        )
        if not fits:
            raise ManifestError(
                f"{source}: tensor {name} must be {wanted.dtype} {wanted.shape} as in the manifest, got {brief(entry)}"
            )
        begin, end = end, end + _BYTES[wanted.dtype] * prod(wanted.shape)
        if len(entry) != 3 or not _same(entry.get("data_offsets"), [begin, end]):
            raise ManifestError(
                f"{source}: tensor {name} must have dtype, shape and data_offsets {[begin, end]} only, got "
                f"{brief(entry)}"
            )
        offsets[name] = 8 + length + begin
    if end != len(data) - 8 - length:
        raise ManifestError(
            f"{source} must hold the {end} bytes of data that its header describes, got {len(data) - 8 - length}"
        )
    return offsets


def _begin(entry: Any) -> int:
    offsets = entry.get("data_offsets") if isinstance(entry, dict) else None
    return offsets[0] if isinstance(offsets, list) and offsets and type(offsets[0]) is int else -1


def _same(numbers: Any, wanted: list[int]) -> bool:
    """Return whether these are the same integers; in Python, True and 1.0 also equal 1."""
    return isinstance(numbers, list) and numbers == wanted and all(type(number) is int for number in numbers)


def _check_config(manifest: AdapterManifest, raw: bytes, path: Path) -> None:
    """Check each field of the config that PEFT would read against the manifest."""
    config = strict_json(raw, source=str(path), max_bytes=MAX_CONFIG_BYTES)
    if not isinstance(config, dict):
        raise ManifestError(f"{path} must hold a JSON object, got {brief(config)}")
    config = current_names(config, ADAPTER_CONFIG, source=str(path), error=ManifestError)
    methods = [part.method for part in manifest.adapter.parts]
    if manifest.adapter.peft_type != (right := peft_type(methods, model_type=manifest.base.model_type)):
        raise ManifestError(
            f"{path.with_name(MANIFEST_NAME)}: peft_type must be {right!r} for {manifest.adapter.methods} on "
            f"{manifest.base.model_type}, got {brief(manifest.adapter.peft_type)}"
        )
    try:
        wanted = peft_config(manifest.adapter)
    except (KeyError, TypeError) as error:
        raise ManifestError(
            f"{path.with_name(MANIFEST_NAME)}: the options of the adapter must be complete, but lack {error}"
        ) from None
    for field, value in wanted.items():
        if canonical_json(config.get(field)) != canonical_json(value):
            raise ManifestError(f"{path}: {field} must be {brief(value)}, got {brief(config.get(field))}")
    if unknown := sorted(set(config) - set(wanted)):
        raise ManifestError(f"{path} must not have the fields {', '.join(map(plain, unknown[:5]))}")


def _read(path: Path, cap: int) -> bytes:
    try:
        if path.is_symlink() or not path.is_file():
            raise IntegrityError(
                f"{path} must be a regular file, but is missing or something else. A finished training run writes "
                f"{MANIFEST_NAME}, {CONFIG_NAME} and {WEIGHTS_NAME} into one folder; give that folder."
            )
        with open_regular(path) as file:
            if (size := os.fstat(file.fileno()).st_size) > cap:
                raise IntegrityError(f"{path} must have at most {cap} bytes, got {size}")
            return file.read(cap + 1)  # if the file grows meanwhile, its digest differs
    except OSError as error:
        raise IntegrityError(f"{path} cannot be read: {error.strerror}. Check the file.") from None
