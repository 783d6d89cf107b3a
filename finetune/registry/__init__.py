"""Finished adapters under versioned names: publish them, find them, pull them, and see that they are whole.

Nothing here imports torch, so that the registry commands answer at once.
"""

from finetune.registry.admin import VerifyReport, reindex, verify
from finetune.registry.collection import Collection, Garbage, collect
from finetune.registry.commits import Commit
from finetune.registry.location import default_cache, default_location
from finetune.registry.registry import AdapterRegistry
from finetune.registry.versions import Version

__all__ = [
    "AdapterRegistry",
    "Collection",
    "Commit",
    "Garbage",
    "VerifyReport",
    "Version",
    "collect",
    "default_cache",
    "default_location",
    "reindex",
    "verify",
]
