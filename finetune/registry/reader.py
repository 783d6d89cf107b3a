"""A registry as a reader sees it: resolve, pull, read, list, log, aliases."""

import builtins
import uuid
from collections.abc import Iterable
from pathlib import Path

from finetune.adapters.reference import LATEST, AdapterRef, check_name_part, folder_hint
from finetune.errors import NotFoundError
from finetune.registry.log.commits import Commit
from finetune.registry.log.finding import find, none_of_that_name
from finetune.registry.log.guard import Guard
from finetune.registry.log.index import ListIndex, OnError
from finetune.registry.log.listing import every_version, wanted, warn_of_unreadable
from finetune.registry.log.log import Log
from finetune.registry.log.version_files import Contents, nothing_missing, read_published, read_pulled
from finetune.registry.log.versions import Version
from finetune.registry.storage.adapter_folders import (
    build_folder,
    holds,
    keep_signature,
)
from finetune.registry.storage.local import LocalStore
from finetune.registry.storage.location import (
    default_cache,
    default_location,
    is_registry,
    open_store,
    refuse_in_registry,
    registry_uuid,
)
from finetune.registry.storage.memory import MemoryStore
from finetune.registry.storage.store import exists
from finetune.registry.storage.trial import check_create
from finetune.registry.trust.policy import TrustPolicy
from finetune.registry.trust.signing import SigningKey


class RegistryReader:
    """The methods that read a registry; ``AdapterRegistry`` adds those that write.

    Attributes:
        location: the folder, or the URL, of the registry.
        store: the store with the bytes of the registry.
        guard: the trust policy, the rollback protection and the signing key.
    """

    def __init__(
        self,
        location: str | Path | None = None,
        *,
        signer: SigningKey | str | Path | None = None,
        trust: TrustPolicy | str | Path | None = None,
    ) -> None:
        """Open a registry; the first publish makes it.

        Args:
            location: a folder; or ``s3://bucket/prefix``, ``gs://...`` or ``az://...``, with credentials and endpoint
                from the environment, as obstore reads them; or ``memory://`` for a registry that ends with this object;
                None for ``default_location()``.
            signer: the key that signs new entries, or its file, which the first write opens; None for
                ``$FINETUNE_SIGNING_KEY``, without which nothing is signed.
            trust: the trust policy, or its file; None for ``$FINETUNE_TRUST`` or ``~/.finetune/trust.yaml``, without
                which no signature is required.

        Raises:
            StoreError: the location is not valid, or the environment lacks settings that it needs.
        """
        self.location = str(location or default_location())
        self.store = open_store(self.location)
        # Each registry in memory gets its own location, because no two share data.
        place = f"memory://{uuid.uuid4().hex}" if isinstance(self.store, MemoryStore) else self.location
        self.guard = Guard.configured(place, signer=signer, trust=trust)
        self._is_registry = False
        self._logs: dict[str, Log] = {}

    def resolve(self, ref: str | AdapterRef) -> Version:
        """Return the version that a reference means now.

        An alias never gives a yanked version. A reference by number or digest does; the version then has a ``warning``.

        Raises:
            AdapterReferenceError: ``ref`` is not a reference.
            NotFoundError: there is no such adapter, version or alias; the message names the existing ones.
            YankedError: the alias points to a yanked version, or every version is yanked.
            TrustError: the namespace requires signatures, and the version has no accepted one, or the log is older than
                it was before.
        """
        ref = AdapterRef.parse(ref) if isinstance(ref, str) else ref
        log = self._log(ref)
        head = self._head(log, ref)
        # First of all, because even the errors below depend on the newest entry.
        accepted = self.guard.check_head(log, head)
        entry = find(log, head, ref)
        if accepted:
            self.guard.check_version(log, head, entry)
        return Version.of(ref, entry, head)

    def pull(self, ref: str | AdapterRef | Version, into: str | Path | None = None) -> Path:
        """Return a folder that holds exactly the manifest and the files of a version, every byte checked.

        It also holds ``manifest.sig`` when the version is signed. The folder appears whole or not at all. A folder of
        an earlier pull is hashed again before it is returned; in the cache a damaged folder is built again.

        Args:
            ref: a reference; or the version that ``resolve`` returned, when you need its ``warning`` too.
            into: the folder to make; None for a folder in ``default_cache()``.

        Raises:
            NotFoundError: there is no such adapter, version or alias.
            YankedError: the alias points to a yanked version.
            IntegrityError: the registry is damaged.
            StoreError: the folder cannot be written, or ``into`` holds something else or lies in a registry.
            TrustError: the namespace requires signatures, and the version has no accepted one.
        """
        if into is not None:
            refuse_in_registry(Path(into), elsewhere=" (--into)")
        version = self._to_read(ref)
        target = default_cache() / version.digest if into is None else Path(into).expanduser().absolute()
        if not holds(target, version.digest):
            with nothing_missing(version.ref):
                build_folder(self.store, version.digest, version.full_name, target, replace=into is None)
        keep_signature(target, version.signature)
        return target

    def read(self, ref: str | AdapterRef | Version) -> Contents:
        """Return the manifest of a version, and the function that reads one of its files; every byte is checked.

        A version in a folder on this machine is read directly; a version in any other store is pulled first.

        Args:
            ref: a reference; or the version that ``resolve`` returned, when you need its ``warning`` too.

        Raises:
            RegistryError: as for ``pull``; the function that reads a file raises it too.
            IntegrityError: the registry is damaged.
            TrustError: as for ``pull``.
        """
        version = self._to_read(ref)
        if isinstance(self.store, LocalStore):
            return read_published(self.store, version)
        return read_pulled(self.pull(version))

    def list(
        self,
        namespace: str | None = None,
        *,
        base: str | None = None,
        task: str | None = None,
        metric: str | Iterable[str] = (),
        all_versions: bool = False,
        onerror: OnError | None = None,
    ) -> builtins.list[Version]:
        """Return the latest version of every adapter, by name.

        The list leaves out an adapter whose log cannot be read, and continues with the others.

        Args:
            namespace: the namespace to list; None for all.
            base: the hub id of the base, or the beginning of its digest; None for any.
            task: the name of the task; None for any.
            metric: one or several conditions that must all hold, such as ``test.METRIC>=0.7``.
            all_versions: True to return every version, also yanked ones, the oldest of a name first.
            onerror: the function that gets the name of each adapter that cannot be read, and the error; None warns.

        Raises:
            ConditionError: ``metric`` is not a condition.
            StoreError: the store cannot be read.
        """
        if namespace is not None:
            check_name_part(namespace)
        versions: builtins.list[Version] = []
        if self._open():
            index = ListIndex(registry_uuid(self.store), self.location)
            onerror = onerror or warn_of_unreadable
            versions = (
                every_version(self.store, namespace, self.log, onerror)
                if all_versions
                else index.latest(self.store, namespace, self._latest, onerror)
            )
        return wanted(versions, base=base, task=task, metrics=[metric] if isinstance(metric, str) else metric)

    def _latest(self, namespace: str, name: str, seq: int) -> tuple[Version, int] | None:
        ref = AdapterRef(namespace=namespace, name=name, alias=LATEST)
        log = self._log(ref)
        # The start of the search: after an old listing the search is longer, not wrong.
        log.known = max(log.known, seq)
        if log.known == 0 and not exists(self.store, log.key(1)):
            return None
        head = self._head(log, ref)
        return Version.of(ref, log.find_version(head.aliases[LATEST], head), head), head.seq

    def log(self, name: str) -> builtins.list[Commit]:
        """Return all log entries of the adapter ``ns/name``, the oldest first.

        Raises:
            NotFoundError: there is no such adapter.
        """
        ref = AdapterRef.parse_name(name)
        log = self._log(ref)
        return [*log.entries(self._head(log, ref))]

    def aliases(self, name: str) -> dict[str, int]:
        """Return the aliases of the adapter ``ns/name``, each with the number of its version.

        Aliases of yanked versions are left out.

        Raises:
            NotFoundError: there is no such adapter.
        """
        ref = AdapterRef.parse_name(name)
        head = self._head(self._log(ref), ref)
        return {alias: version for alias, version in head.aliases.items() if str(version) not in head.yanked}

    def _to_read(self, ref: str | AdapterRef | Version) -> Version:
        """Return the version to read, after the check of its manifest's signature."""
        version = ref if isinstance(ref, Version) else self.resolve(ref)
        self.guard.check_manifest(version)
        return version

    def _open(self, *, create: bool = False) -> bool:
        self._is_registry = self._is_registry or is_registry(self.store)
        if create and not self._is_registry:
            # Many servers treat a create as a plain write; the hard links of a folder are always atomic.
            if "://" in self.location:
                check_create(self.store)
            self._is_registry = is_registry(self.store, create=True)
        return self._is_registry

    def _log(self, ref: AdapterRef) -> Log:
        return self._logs.setdefault(ref.full_name, Log(self.store, ref.namespace, ref.name, self.guard))

    def _head(self, log: Log, ref: AdapterRef) -> Commit:
        if not self._open():
            raise NotFoundError(
                f"no adapter {ref.full_name!r}: there is no registry at {self.location}. The first publish makes one."
                f"{folder_hint(ref.full_name)}"
            )
        head = log.head()
        if head is None:
            self.guard.check_head(log, None)
            raise none_of_that_name(self.store, self.location, ref)
        return head
