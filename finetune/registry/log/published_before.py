"""The note on a version that was published before: the same bytes, or the same weights with another manifest."""

from finetune.adapters.manifest import WEIGHTS_NAME, AdapterManifest
from finetune.errors import FinetuneError
from finetune.registry.log.commits import Commit
from finetune.registry.log.log import Log
from finetune.registry.storage.adapter_folders import load_manifest
from finetune.registry.storage.blobs import blob_key
from finetune.registry.storage.store import Store, exists

LOOKED_AT = 20  # versions: each costs one or two requests, only when the store has the weights already


def has_weights(store: Store, manifest: AdapterManifest) -> bool:
    """Return whether the store has the weights that ``manifest`` lists, from any adapter."""
    return exists(store, blob_key(manifest.files[WEIGHTS_NAME].sha256))


def published_before(store: Store, log: Log, commit: Commit, manifest: AdapterManifest) -> str | None:
    """Return a note when one of the 20 versions before has the same bytes or weights; else None.

    Args:
        store: the store that holds the manifests of these versions.
        log: the log of the adapter.
        commit: the entry that published the version.
        manifest: the manifest of the version.
    """
    weights = manifest.files[WEIGHTS_NAME].sha256
    for number in range(commit.version - 1, max(0, commit.version - 1 - LOOKED_AT), -1):
        try:
            digest = log.find_version(number, commit).manifest
            if digest == commit.manifest:
                return f"version {commit.version} has the same bytes as version {number}"
            before = load_manifest(store, digest, f"{log.namespace}/{log.name}")[1]
        except FinetuneError:  # an earlier version that is damaged cannot be compared
            continue
        if before.files[WEIGHTS_NAME].sha256 == weights:
            return f"version {commit.version} has the same weights as version {number}"
    return None
