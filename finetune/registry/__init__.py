"""The registry of finished adapters under versioned names: publish, find, pull and verify them.

Nothing here imports torch, so that the registry commands answer at once.
"""

from finetune.registry.admin import VerifyReport, reindex, verify
from finetune.registry.archive import export_archive, open_archive
from finetune.registry.commits import Commit
from finetune.registry.copying import copy_adapter, copy_adapters
from finetune.registry.differences import differences
from finetune.registry.doctor import Finding, diagnose
from finetune.registry.garbage_collection import Collection, Garbage, collect
from finetune.registry.location import default_cache, default_location
from finetune.registry.promotion import promote
from finetune.registry.registry import AdapterRegistry
from finetune.registry.signing import SigningKey
from finetune.registry.trust import TrustPolicy
from finetune.registry.versions import Version

__all__ = [
    "AdapterRegistry",
    "Collection",
    "Commit",
    "Finding",
    "Garbage",
    "SigningKey",
    "TrustPolicy",
    "VerifyReport",
    "Version",
    "collect",
    "copy_adapter",
    "copy_adapters",
    "default_cache",
    "default_location",
    "diagnose",
    "differences",
    "export_archive",
    "open_archive",
    "promote",
    "reindex",
    "verify",
]
