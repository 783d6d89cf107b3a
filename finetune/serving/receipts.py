"""Receipts of probes that passed on this machine, so that an adapter is not probed again at every load.

A receipt is as trusted as this machine's cache folder: a user who can write there can write the base too. It is valid
for a base with exactly these bytes, which ``finetune.adapters.base_identity`` has hashed since the machine started, and
which no write has changed since. If a receipt is missing or cannot be read, the probe runs.
"""

from __future__ import annotations

import json
from dataclasses import asdict
from functools import cache
from importlib.metadata import version
from typing import TYPE_CHECKING

import torch

from finetune.adapters.manifest import canonical_json, sha256_hex
from finetune.adapters.probe import VERSION, ProbeResult
from finetune.core.cache import cache_home, read_note, write_note

if TYPE_CHECKING:
    from pathlib import Path

    from finetune.assemble.base import Base

# Packages whose version changes the result of the probe.
_PACKAGES = ("torch", "transformers", "finetune-vlm")


def find_receipt(base: Base, digest: str) -> ProbeResult | None:
    """Return the result of the probe of the adapter with this manifest ``digest`` here; None if it has not run."""
    try:
        found = json.loads(read_note(_path(base, digest)) or "{}")
        verdict, difference = found["verdict"], found["difference"]
    except (ValueError, KeyError, TypeError):
        return None
    whole = verdict in ("passed", "inconclusive") and type(difference) is float
    return ProbeResult(verdict, difference) if whole else None


def keep_receipt(base: Base, digest: str, result: ProbeResult) -> None:
    """Save the result of a probe; a cache that cannot be written is not an error."""
    write_note(_path(base, digest), json.dumps(asdict(result)))


def _path(base: Base, digest: str) -> Path:
    device = base.model.device
    about = {
        "adapter": digest,
        "base": base.identity.digest,
        "dtype": str(base.model.dtype),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
        "quantization": base.quantization,
        "attention": base.model.config._attn_implementation,
        "probe": VERSION,
        "versions": _versions(),
    }
    return cache_home() / "probes" / f"{sha256_hex(canonical_json(about))}.json"


@cache
def _versions() -> list[str]:
    return [version(name) for name in _PACKAGES]
