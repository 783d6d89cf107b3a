"""Maintenance of a registry: verify all its objects, and rebuild its index."""

from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

from finetune.adapters.manifest import AdapterManifest
from finetune.errors import FinetuneError, NotFoundError
from finetune.registry.log.commits import MAX_COMMIT_BYTES, Commit, log_key
from finetune.registry.log.guard import Guard
from finetune.registry.log.index import ListIndex
from finetune.registry.log.links import check_link
from finetune.registry.log.log import Log, list_logs
from finetune.registry.log.signature_audit import count_signers, refused_entries
from finetune.registry.registry import AdapterRegistry
from finetune.registry.storage.adapter_folders import load_manifest
from finetune.registry.storage.blobs import blob_key, read_blob
from finetune.registry.storage.location import MAX_REGISTRY_BYTES, REGISTRY_KEY, is_registry, registry_uuid
from finetune.registry.storage.store import ObjectMissing, Store, read_all


@dataclass(kw_only=True)
class VerifyReport:
    """The result of a verification.

    Attributes:
        signed_by: signer -> number of entries that it signed. A signer is the name of a key in the trust policy,
            ``(nobody)``, or a description of another key.
        objects: the number of objects that were read whole.
        bytes: the number of bytes in them.
        problems: one line for each problem, beginning with the key of the object; empty when there is none.
    """

    objects: int = 0
    bytes: int = 0
    problems: list[str] = field(default_factory=list)
    signed_by: Counter[str] = field(default_factory=Counter)


def verify(registry: AdapterRegistry) -> VerifyReport:
    """Read and hash everything that a log names, and check that every log is an unbroken chain.

    No later entry holds the digest of the newest one. Its checksum and its signature reveal a change to it. Without a
    signature, a forged entry is found only where it contradicts its manifest or the entry before it.

    Raises:
        NotFoundError: there is no registry.
    """
    logs = list_logs(registry.store)
    verification = _Verification(registry.store, registry.guard)
    verification.check_registry_file(registry.location, is_used=bool(logs))
    for (namespace, name), entries in logs.items():
        verification.check_log(namespace, name, entries)
    return verification.report


def reindex(registry: AdapterRegistry) -> tuple[Path, int]:
    """Rebuild the index that makes ``list`` fast.

    ``list`` never needs that: where the index is wrong, it reads the logs.

    Returns:
        The file of the index, and the number of adapters in it.

    Raises:
        NotFoundError: there is no registry.
    """
    try:
        index = ListIndex(registry_uuid(registry.store), registry.location)
    except ObjectMissing:
        raise NotFoundError(
            f"there is no registry at {registry.location}. Check --registry or FINETUNE_REGISTRY."
        ) from None
    index.forget()
    return index.path, len(registry.list())


class _Verification:
    def __init__(self, store: Store, guard: Guard) -> None:
        self.store = store
        self.guard = guard
        self.report = VerifyReport()
        # By digest and the name that the manifest must have; None for a damaged manifest.
        self.manifests: dict[tuple[str, str], AdapterManifest | None] = {}
        self.blobs: set[tuple[str, int]] = set()  # digest and size of those looked at

    def check_registry_file(self, location: str, *, is_used: bool) -> None:
        try:
            if is_registry(self.store):
                self.count(len(read_all(self.store, REGISTRY_KEY, max_bytes=MAX_REGISTRY_BYTES)))
                return
        except FinetuneError as error:
            self.problem(REGISTRY_KEY, error)
            return
        if not is_used:
            raise NotFoundError(f"there is no registry at {location}. Check --registry or FINETUNE_REGISTRY.")
        self.problem(
            REGISTRY_KEY, "the file is missing, and without it no command finds this registry. Restore a copy of it."
        )

    def check_log(self, namespace: str, name: str, entries: list[int]) -> None:
        """Check the entries with these numbers, ascending, and the objects that they name."""
        last, previous = 0, None
        readable: list[Commit] = []
        for seq in entries:
            key = log_key(namespace, name, seq)
            if seq != last + 1:
                self.problem(log_key(namespace, name, last + 1), f"the entry is missing, but entry {seq} exists")
            # Entry seq - 1 when it could be read; without it there is nothing to compare with.
            before = previous if previous is not None and previous.seq == seq - 1 else None
            last, previous = seq, self.read_commit(key)
            if previous is None:
                continue
            readable.append(previous)
            if before is not None or seq == 1:
                for text in check_link(previous, before):
                    self.problem(key, text)
            if previous.op == "publish":
                self.check_version(f"{namespace}/{name}", key, previous)
        log = Log(self.store, namespace, name, self.guard)
        self.report.signed_by.update(count_signers(self.guard, log, readable))
        for seq, text in refused_entries(self.guard, log, readable):
            self.problem(log_key(namespace, name, seq), text)

    def read_commit(self, key: str) -> Commit | None:
        try:
            raw = read_all(self.store, key, max_bytes=MAX_COMMIT_BYTES)
            self.count(len(raw))
            return Commit.parse(raw, source=key)
        except FinetuneError as error:
            self.problem(key, error)
            return None

    def check_version(self, full_name: str, log_entry: str, commit: Commit) -> None:
        wanted = (commit.manifest, full_name)
        if wanted not in self.manifests:
            self.manifests[wanted] = self.read_manifest(full_name, commit)
        manifest = self.manifests[wanted]
        if manifest is None:
            return
        if manifest.summary() != commit.current_summary:
            self.problem(
                log_entry, f"its `summary` must be that of its manifest, and differs ({blob_key(commit.manifest)})"
            )
        for file, entry in manifest.files.items():
            if (entry.sha256, entry.size) not in self.blobs:
                self.blobs.add((entry.sha256, entry.size))
                try:
                    self.count(sum(len(piece) for piece in read_blob(self.store, entry)))
                except FinetuneError as error:
                    self.problem(blob_key(entry.sha256), error, f"{file} of {full_name}@{commit.version}")

    def read_manifest(self, full_name: str, commit: Commit) -> AdapterManifest | None:
        try:
            raw, manifest = load_manifest(self.store, commit.manifest, full_name)
        except FinetuneError as error:
            self.problem(blob_key(commit.manifest), error, f"manifest of {full_name}@{commit.version}")
            return None
        self.count(len(raw))
        return manifest

    def count(self, size: int) -> None:
        self.report.objects += 1
        self.report.bytes += size

    def problem(self, key: str, what: object, used_as: str = "") -> None:
        text = str(what).removeprefix(f"{key}: ")
        self.report.problems.append(f"{key}: {text}" + (f" ({used_as})" if used_as else ""))
