"""Entries of a log as someone would write them who knows how, but lies."""

import json

from finetune.adapters.manifest import canonical_json, sha256_hex


def forged(raw: bytes, old: bytes, new: bytes) -> bytes:
    """The entry with ``old`` replaced, and the checksum that fits it."""
    assert old in raw
    data = json.loads(raw.replace(old, new))
    del data["checksum"]
    return canonical_json(data | {"checksum": sha256_hex(canonical_json(data))})
