"""A version as a repository of the Hugging Face Hub: the adapter's files, its manifest, and a model card.

A downloaded repository is an adapter folder: ``finetune.load`` opens it, and ``publish`` takes it. The version's
number is the tag ``v17``, which never moves. The default branch shows the last mirrored version.
"""

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from finetune.adapters.card import CARD_NAME, Card, model_card
from finetune.adapters.manifest import MANIFEST_NAME, AdapterManifest, sha256_hex
from finetune.adapters.peft_format import OURS
from finetune.errors import ConflictError, FinetuneError, StoreError
from finetune.registry.log.versions import Version
from finetune.registry.registry import AdapterRegistry
from finetune.registry.storage.adapter_folders import HUB_FILES, read_manifest
from finetune.registry.transfer.mirror_folder import new_folder

if TYPE_CHECKING:
    from huggingface_hub import HfApi

_ELSEWHERE = " (--hub-folder)"
_LOADING = """\
import finetune

vlm = finetune.load("FOLDER", base="BASE")  # this folder, downloaded; the base"""
_CHECKS = "That way it is checked first: every digest, the base, and its effect on a probe."


def write_hub_folder(registry: AdapterRegistry, version: Version, into: str | Path) -> Path:
    """Write the folder of a repository of the hub; every byte of the adapter is checked.

    A card among the adapter's own files stays as it is.

    Args:
        registry: the registry that holds the version.
        version: the version to write.
        into: the folder to make, which appears whole or not at all.

    Returns:
        The folder.

    Raises:
        IntegrityError: the registry is damaged.
        StoreError: the folder cannot be written, or is not empty.
    """
    into = Path(into)
    with new_folder(into, elsewhere=_ELSEWHERE) as new:
        registry.pull(version, new)
        manifest = read_manifest(new)[1]
        if CARD_NAME not in manifest.files:
            (new / CARD_NAME).write_text(model_card(manifest, _card(version, manifest)), encoding="utf-8")
    return into


def _card(version: Version, manifest: AdapterManifest) -> Card:
    # PEFT refuses our own method types, so the card must not name PEFT for them.
    is_pefts = manifest.adapter.peft_type != OURS
    return Card(
        version=f"version {version.version}",
        digest=version.digest,
        library_name="peft" if is_pefts else None,
        loading=_LOADING,
        checks=_CHECKS + (" PEFT opens the folder too, without these checks." if is_pefts else ""),
    )


def upload_to_hub(registry: AdapterRegistry, version: Version, repo_id: str, *, private: bool = True) -> str:
    """Make a repository of the hub show a version, in one commit, and tag it; an existing tag stays.

    The token and the hub's address are those of ``huggingface_hub``: ``hf auth login``, HF_TOKEN, HF_ENDPOINT.

    Args:
        registry: the registry that holds the version.
        version: the version to upload.
        repo_id: the id of the repository, ``owner/name``; a missing repository is made.
        private: True to make a missing repository visible to its owner only.

    Returns:
        The id of the commit that the tag points to.

    Raises:
        ConflictError: the repository holds something else, or its tag points to another manifest; nothing was changed.
        StoreError: the hub refused, or cannot be reached.
    """
    from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi

    api, tag = HfApi(library_name="finetune-vlm"), f"v{version.version}"
    with tempfile.TemporaryDirectory(prefix="finetune-mirror-") as work, _explained(repo_id):
        api.create_repo(repo_id, private=private, exist_ok=True)
        refs = api.list_repo_refs(repo_id)
        done = {ref.name: ref.target_commit for ref in refs.tags}.get(tag)
        theirs = set(api.list_repo_files(repo_id))
        _check_is_ours(api, repo_id, version, theirs, Path(work, "theirs"))
        if done is not None:  # by an earlier try, or by another user
            raw, _ = _manifest_at(api, repo_id, done, Path(work, "tagged"))
            if sha256_hex(raw) != version.digest:
                raise ConflictError(
                    f"{repo_id}: the tag {tag} must point to the manifest sha256:{version.digest}, but points to "
                    f"sha256:{sha256_hex(raw)}. Nothing was changed. Choose another repository."
                )
            return done
        folder = write_hub_folder(registry, version, Path(work, "new"))
        ours = {path.name: path for path in folder.iterdir()}
        gone = sorted(theirs - ours.keys() - {".gitattributes"})
        commit = api.create_commit(
            repo_id,
            [
                *(CommitOperationAdd(name, path) for name, path in sorted(ours.items())),
                *(CommitOperationDelete(name, is_folder=False) for name in gone),
            ],
            commit_message=f"{version.ref} (sha256:{version.digest})",
            parent_commit=next((ref.target_commit for ref in refs.branches if ref.name == "main"), None),
        )
        api.create_tag(repo_id, tag=tag, revision=commit.oid)
        return commit.oid


def _check_is_ours(api: "HfApi", repo_id: str, version: Version, theirs: set[str], folder: Path) -> None:
    """Refuse a repository in which something other than this adapter would be replaced."""
    if MANIFEST_NAME in theirs:
        _, manifest = _manifest_at(api, repo_id, "main", folder)
        if manifest.full_name != version.full_name:
            raise ConflictError(
                f"{repo_id} must hold versions of {version.full_name}, but holds {manifest.full_name}. Choose another "
                "repository."
            )
    elif others := sorted(theirs - HUB_FILES):
        raise ConflictError(
            f"{repo_id} must be empty or hold an adapter of a registry, but holds {', '.join(others[:3])}. Choose "
            "another repository."
        )


def _manifest_at(api: "HfApi", repo_id: str, revision: str, folder: Path) -> tuple[bytes, AdapterManifest]:
    api.hf_hub_download(repo_id, MANIFEST_NAME, revision=revision, local_dir=folder)
    return read_manifest(folder)


@contextmanager
def _explained(repo_id: str) -> Iterator[None]:
    import httpx2
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalTokenNotFoundError, OfflineModeIsEnabled

    try:
        yield
    except FinetuneError:  # a built-in error too, and already explained
        raise
    except HFValidationError as error:
        raise StoreError(f"{repo_id!r} is not a valid id of a repository on the hub: {error}") from None
    except (LocalTokenNotFoundError, OfflineModeIsEnabled, HfHubHTTPError, httpx2.HTTPError, RuntimeError) as error:
        reason = " ".join(str(error).split())
        raise StoreError(
            f"the hub refused {repo_id}: {reason} Log in with `hf auth login`, and check that the token may write."
        ) from error
