"""Results of probes on this machine, so that neither an adapter nor its base is probed again at every load.

A receipt is of an adapter that passed; beside it stand the values of each base alone, which all its adapters share.
Both are as trusted as this machine's cache folder: a user who can write there can write the base too. They are valid
for a base with exactly these bytes, which ``finetune.adapters.base_identity`` has hashed since the machine started, and
which no write has changed since. If one is missing or cannot be read, the probe runs.
"""

from __future__ import annotations

import json
from dataclasses import asdict
from functools import cache
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

import torch

from finetune.adapters.manifest import canonical_json, sha256_hex
from finetune.adapters.probe import VERSION, ProbeResult
from finetune.core.cache import cache_home, read_note, write_note
from finetune.core.matmul import ONEDNN_IS_FASTER

if TYPE_CHECKING:
    from pathlib import Path

    from torch import Tensor

    from finetune.assemble.base import Base

# Packages whose version changes the result of the probe.
_PACKAGES = ("torch", "transformers", "finetune-vlm")


def find_receipt(base: Base, digest: str) -> ProbeResult | None:
    """Return the result of the probe of the adapter with this manifest ``digest`` here; None if it has not run."""
    try:
        found = json.loads(read_note(_receipt(base, digest)) or "{}")
        verdict, difference = found["verdict"], found["difference"]
    except (ValueError, KeyError, TypeError):
        return None
    whole = verdict in ("passed", "inconclusive") and type(difference) is float
    return ProbeResult(verdict, difference) if whole else None


def keep_receipt(base: Base, digest: str, result: ProbeResult) -> None:
    """Save the result of a probe; a cache that cannot be written is not an error."""
    write_note(_receipt(base, digest), json.dumps(asdict(result)))


def find_base_values(base: Base, seed: int) -> Tensor | None:
    """Return the probe's values of the base alone, in the shape of ``probe_values``; None if they are not known here.

    Args:
        base: the base.
        seed: the seed of the probe.
    """
    try:
        found = torch.tensor(json.loads(read_note(_base_values(base, seed)) or "null"), dtype=torch.float32)
    except (ValueError, TypeError, RuntimeError):
        return None
    return found if found.ndim == 2 else None


def keep_base_values(base: Base, seed: int, values: Tensor) -> None:
    """Save the probe's values of the base alone; a cache that cannot be written is not an error."""
    write_note(_base_values(base, seed), json.dumps(values.tolist()))


def _receipt(base: Base, digest: str) -> Path:
    return _place("probes", {"adapter": digest, **_about(base)})


def _base_values(base: Base, seed: int) -> Path:
    # An adapter's effect may be close to the rounding in which CPUs differ, and machines may share a folder.
    cpu = [torch.backends.cpu.get_cpu_capability(), ONEDNN_IS_FASTER]
    about = {"seed": seed, "processor": base.digests.model_dump(), "cpu": cpu, **_about(base)}
    return _place("base-probes", about)


def _about(base: Base) -> dict[str, Any]:
    """Return the settings on which the outputs of a base depend."""
    device = base.model.device
    return {
        "base": base.identity.digest,
        "dtype": str(base.model.dtype),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
        "quantization": base.quantization,
        "attention": base.model.config._attn_implementation,
        "probe": VERSION,
        "versions": _versions(),
    }


def _place(folder: str, about: dict[str, Any]) -> Path:
    return cache_home() / folder / f"{sha256_hex(canonical_json(about))}.json"


@cache
def _versions() -> list[str]:
    return [version(name) for name in _PACKAGES]
