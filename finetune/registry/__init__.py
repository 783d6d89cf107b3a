"""The registry of finished adapters under versioned names: publish, find, pull and verify them.

Nothing here imports torch, so the registry commands start fast.
"""

from finetune.registry.differences import differences
from finetune.registry.log.commits import Commit
from finetune.registry.log.versions import Version
from finetune.registry.maintenance.doctor import diagnose
from finetune.registry.maintenance.garbage_collection import Collection, Garbage, collect
from finetune.registry.maintenance.verification import VerifyReport, reindex, verify
from finetune.registry.promotion import promote
from finetune.registry.registry import AdapterRegistry
from finetune.registry.storage.location import default_cache, default_location
from finetune.registry.storage.trial import Finding
from finetune.registry.transfer.archive import export_archive, open_archive
from finetune.registry.transfer.copying import copy_adapter, copy_adapters
from finetune.registry.trust.policy import TrustPolicy
from finetune.registry.trust.signing import SigningKey

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
