"""A store of features on disk: the frozen modules of a base compute a row's only once, for all runs on this machine.

::

    <cache>/features/<base, processor, precision, device kind, versions, boundary>/<2>/<pixels, text>.features

A file holds its own SHA-256 and then safetensors. It is written aside and renamed, so it is whole or missing, and two
processes that write the same file write the same bytes. One file holds the features of all images of a row, since some
processors treat an image beside others in another way than alone. A file's modification time is the time of its last
use, to the hour. Features that no run has used for a week may be removed to make room.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import time
from contextlib import suppress
from typing import TYPE_CHECKING, Any, TypeAlias
from uuid import uuid4

import numpy as np
import torch
from safetensors.torch import load as load_tensors
from safetensors.torch import save as save_tensors

from finetune.core.batch import Features
from finetune.core.cache import cache_home
from finetune.core.hollow import hollow, is_hollow
from finetune.data.image_checks import source_key
from finetune.errors import TrainingError

if TYPE_CHECKING:
    from collections.abc import Hashable, Mapping, Sequence
    from pathlib import Path

    from finetune.core.example import Example, ImageSource

Places: TypeAlias = tuple[Any, ...]  # the keys of a row's images, each hashable
_DIGEST = 32  # bytes of a SHA-256
_META = "features"  # the key of our JSON text in safetensors' metadata
_SUFFIX = ".features"
_HOUR = 3600  # seconds
_UNUSED = 7 * 24 * _HOUR  # a run reads all of its features when it starts, and some again at its end


class FeatureStore:
    """The features that one base computes up to one boundary, with one processor, precision and type of device.

    Args:
        key: all values on which the features depend, except the row's own.
    """

    def __init__(self, key: Mapping[str, Any]):
        name = hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()
        self.folder = _root() / name[:32]

    def path(self, digests: Sequence[str]) -> Path:
        """Return the path of the features of a row, whether or not they are stored.

        Args:
            digests: the digest of each image's pixels, in order; and of the row's text, if the features depend on it.
        """
        name = hashlib.sha256(" ".join(digests).encode()).hexdigest()
        return self.folder / name[:2] / f"{name}{_SUFFIX}"

    def put(self, path: Path, features: Features) -> int:
        """Store features, and return their size in bytes.

        Raises:
            OSError: the features cannot be written; no part of them stays on the disk.
        """
        data = _pack(features)
        path.parent.mkdir(parents=True, exist_ok=True)
        aside = path.with_name(f".{path.name}.{uuid4().hex}")
        try:
            aside.write_bytes(data)
            os.replace(aside, path)
        finally:
            with suppress(FileNotFoundError):
                aside.unlink()
        return len(data)


class StoredFeatures:
    """Stored features, found by rows; worker processes can take a copy.

    Args:
        paths: the images of each row -> the file of their features.
        supervised: the key of each row of a training batch -> the file of features that depend on its text too; None
            if there are none.
    """

    def __init__(self, paths: Mapping[Hashable, Path], supervised: Mapping[Hashable, Path] | None = None):
        self._paths = dict(paths)
        self._supervised = None if supervised is None else dict(supervised)

    def __call__(self, rows: Sequence[Example], *, supervised: bool) -> list[Features | None]:
        """Return the features of each row of a batch; None for a row without images if only images have features.

        Args:
            rows: the rows.
            supervised: whether it is a training batch, with answers. If a row of it has no features of its text, all
                rows get those of their images.

        Raises:
            TrainingError: the run has not stored these features, or they were changed or removed since.
        """
        if supervised and self._supervised is not None:
            paths = [self._supervised.get(row_key(row)) for row in rows]
            if all(paths):
                return [_read(path, f"row {row.id}") for row, path in zip(rows, paths, strict=True)]
        return [
            _read(self._paths.get(places_of(row.images)), f"the images of row {row.id}") if row.images else None
            for row in rows
        ]

    def with_supervised(self, paths: Mapping[Hashable, Path]) -> StoredFeatures:
        """Return these features with those of training rows."""
        return StoredFeatures(self._paths, paths)


def _read(path: Path | None, name: str) -> Features:
    if path is None:
        raise TrainingError(
            f"the run has stored no features of {name}. Start the run again: it stores them before the first step."
        )
    features = read(path)
    if features is None:
        raise TrainingError(
            f"{path}: the stored features of {name} were changed or removed on the disk. Start the run again: it "
            "computes them again and continues from its last checkpoint."
        )
    return features


def row_key(row: Example) -> bytes:
    """Return a key of all in a row that decides its training input, within a run."""
    parts = (row.messages, row.unsupervised, places_of(row.images))
    return hashlib.sha256(repr(parts).encode(errors="surrogatepass")).digest()


def places_of(images: Sequence[ImageSource]) -> Places:
    """Return the keys of a row's images within a run; they do not depend on the state of the files."""
    return tuple(source_key(source) if isinstance(source, np.ndarray) else source for source in images)


def is_whole(path: Path) -> bool:
    """Return whether a file exists with every byte as it was written."""
    return _read_bytes(path) is not None


def read(path: Path) -> Features | None:
    """Return stored features; None if the file is missing, or a byte of it has changed."""
    data = _read_bytes(path)
    return None if data is None else _unpack(data)


def make_room(wanted: int, *, max_bytes: int) -> bool:
    """Remove features of any base that no run uses, the longest unused first, until there is room.

    Args:
        wanted: the number of bytes to write.
        max_bytes: the largest number of bytes of all features on this machine.

    Returns:
        True if there is room now, within ``max_bytes`` and on the disk.
    """
    root = _root()
    root.mkdir(parents=True, exist_ok=True)
    for aside in root.glob(f"*/*/.*{_SUFFIX}.*"):  # left by a process that was killed
        if (stat := _stat(aside)) and time.time() - stat.st_mtime > _HOUR:
            aside.unlink(missing_ok=True)
    found = {path: stat for path in root.glob(f"*/*/*{_SUFFIX}") if (stat := _stat(path))}
    taken = sum(stat.st_size for stat in found.values())
    for path, stat in sorted(found.items(), key=lambda item: item[1].st_mtime):
        if taken + wanted <= max_bytes or time.time() - stat.st_mtime < _UNUSED:
            break
        path.unlink(missing_ok=True)
        taken -= stat.st_size
    return taken + wanted <= max_bytes and wanted < shutil.disk_usage(root).free


def _read_bytes(path: Path) -> bytes | None:
    """Return the stored bytes, or None if one of them has changed; set the time of the file's last use."""
    try:
        found = path.read_bytes()
        if time.time() - path.stat().st_mtime > _HOUR:
            os.utime(path)
    except OSError:
        return None
    digest, data = found[:_DIGEST], found[_DIGEST:]
    return data if hashlib.sha256(data).digest() == digest else None


def _pack(features: Features) -> bytes:
    """Return features as bytes: tensors with values by safetensors, hollow ones and all else as JSON."""
    tensors: dict[str, torch.Tensor] = {}
    hollows: dict[str, Any] = {}
    named = [
        (f"outputs/{i}/{path}", tensor) for path, parts in features.outputs.items() for i, tensor in enumerate(parts)
    ]
    named += [(f"processed/{n}", v) for n, v in features.processed.items() if isinstance(v, torch.Tensor)]
    for name, tensor in named:
        if is_hollow(tensor):
            value = tensor[(0,) * tensor.ndim].item()
            hollows[name] = [[*tensor.shape], str(tensor.dtype).removeprefix("torch."), value]
        else:
            tensors[name] = tensor.detach().cpu().contiguous()
    rest = {
        "order": [name for name, _ in named],
        "hollow": hollows,
        "per_token": sorted(features.per_token),
        "processed": {n: v for n, v in features.processed.items() if not isinstance(v, torch.Tensor)},
        "replacements": features.replacements,
    }
    data = save_tensors(tensors, metadata={_META: json.dumps(rest)})
    return hashlib.sha256(data).digest() + data


def _unpack(data: bytes) -> Features:
    tensors = load_tensors(data)
    header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
    rest = json.loads(header["__metadata__"][_META])
    for name, (shape, dtype, value) in rest["hollow"].items():
        tensors[name] = hollow(shape, getattr(torch, dtype), value)
    outputs: dict[str, list[torch.Tensor]] = {}
    processed: dict[str, Any] = {}
    for name in rest["order"]:
        kind, _, path = name.partition("/")
        if kind == "processed":
            processed[path] = tensors[name]
        else:
            outputs.setdefault(path.partition("/")[2], []).append(tensors[name])
    return Features(
        outputs={path: tuple(parts) for path, parts in outputs.items()},
        per_token=frozenset(rest["per_token"]),
        processed={**processed, **rest["processed"]},
        replacements=tuple(rest["replacements"]),
    )


def _root() -> Path:
    return cache_home() / "features"


def _stat(path: Path) -> os.stat_result | None:
    try:
        return path.stat()
    except OSError:  # removed meanwhile
        return None
