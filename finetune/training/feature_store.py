"""A store of image features on disk: a frozen tower computes each image only once, for all runs on this machine.

::

    <cache>/features/<base, processor, precision, device kind, versions>/<2>/<pixels>.features

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

from finetune.core.batch import ImageFeatures
from finetune.core.cache import cache_home
from finetune.data.image_checks import source_key
from finetune.errors import TrainingError

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path

    from finetune.core.example import ImageSource

Places: TypeAlias = tuple[Any, ...]  # the keys of a row's images, each hashable
_DIGEST = 32  # bytes of a SHA-256
_META = "features"  # the key of our JSON text in safetensors' metadata
_SUFFIX = ".features"
_HOUR = 3600  # seconds
_UNUSED = 7 * 24 * _HOUR  # a run reads all of its features when it starts, and some again at its end


class FeatureStore:
    """The features that one base computes from images with one processor, precision and type of device.

    Args:
        key: all values except the pixels on which the features depend.
    """

    def __init__(self, key: Mapping[str, Any]):
        name = hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()
        self.folder = _root() / name[:32]

    def path(self, digests: Sequence[str]) -> Path:
        """Return the path of the features of a row's images, whether or not they are stored.

        Args:
            digests: the digest of each image's pixels, in order.
        """
        name = hashlib.sha256(" ".join(digests).encode()).hexdigest()
        return self.folder / name[:2] / f"{name}{_SUFFIX}"

    def put(self, path: Path, features: ImageFeatures) -> int:
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
    """Stored features, found by the images of a row; worker processes can take a copy.

    Args:
        paths: the images of each row -> the file of their features.
    """

    def __init__(self, paths: Mapping[Places, Path]):
        self._paths = dict(paths)

    def __call__(self, images: Sequence[ImageSource]) -> ImageFeatures:
        """Return the features of a row's images.

        Raises:
            TrainingError: the run has not stored these features, or they were changed or removed since.
        """
        path = self._paths.get(places_of(images))
        if path is None:
            raise TrainingError(
                f"the run has stored no features of {', '.join(map(str, images))}. Start the run again: it stores them "
                "before the first step."
            )
        features = read(path)
        if features is None:
            raise TrainingError(
                f"{path}: the stored features of an image were changed or removed on the disk. Start the run again: it "
                "computes them again and continues from its last checkpoint."
            )
        return features


def places_of(images: Sequence[ImageSource]) -> Places:
    """Return the keys of a row's images within a run; they do not depend on the state of the files."""
    return tuple(source_key(source) if isinstance(source, np.ndarray) else source for source in images)


def is_whole(path: Path) -> bool:
    """Return whether a file exists with every byte as it was written."""
    return _read_bytes(path) is not None


def read(path: Path) -> ImageFeatures | None:
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


def _pack(features: ImageFeatures) -> bytes:
    tensors = {"pooled": features.pooled}
    tensors |= {f"deepstack/{i}": layer for i, layer in enumerate(features.deepstack)}
    tensors |= {f"processed/{n}": v for n, v in features.processed.items() if isinstance(v, torch.Tensor)}
    rest = {
        "as_list": features.as_list,
        "processed": {n: v for n, v in features.processed.items() if not isinstance(v, torch.Tensor)},
        "replacements": features.replacements,
    }
    held = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    data = save_tensors(held, metadata={_META: json.dumps(rest)})
    return hashlib.sha256(data).digest() + data


def _unpack(data: bytes) -> ImageFeatures:
    tensors = load_tensors(data)
    header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
    rest = json.loads(header["__metadata__"][_META])
    own = {name.partition("/")[2]: tensor for name, tensor in tensors.items() if name.startswith("processed/")}
    num_layers = sum(name.startswith("deepstack/") for name in tensors)
    return ImageFeatures(
        pooled=tensors["pooled"],
        deepstack=tuple(tensors[f"deepstack/{i}"] for i in range(num_layers)),
        as_list=rest["as_list"],
        processed={**own, **rest["processed"]},
        replacements=tuple(rest["replacements"]),
    )


def _root() -> Path:
    return cache_home() / "features"


def _stat(path: Path) -> os.stat_result | None:
    try:
        return path.stat()
    except OSError:  # removed meanwhile
        return None
