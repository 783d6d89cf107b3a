"""Finished adapters under versioned names: publish them, find them, pull them, and see that they are whole.

Nothing here imports torch, so that the registry commands answer at once.
"""

from finetune.registry.admin import VerifyReport, verify
from finetune.registry.commits import Commit
from finetune.registry.location import default_cache, default_location
from finetune.registry.registry import AdapterRegistry
from finetune.registry.signing import SigningKey
from finetune.registry.trust import TrustPolicy
from finetune.registry.versions import Version

__all__ = [
    "AdapterRegistry",
    "Commit",
    "SigningKey",
    "TrustPolicy",
    "VerifyReport",
    "Version",
    "default_cache",
    "default_location",
    "verify",
]
