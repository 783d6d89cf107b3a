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
    """The verbs that change nothing in a registry; ``AdapterRegistry`` adds those that do.

    Attributes:
        location: the folder, or the URL, of the registry.
        store: the store that holds its bytes.
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
            location: a folder, ``s3://bucket/prefix``, ``gs://`` or ``az://`` likewise (credentials and endpoint
                come from the environment, as obstore reads them), or ``memory://`` for one that ends with this
                object; None for ``default_location()``.
            signer: the key that signs what is written, or its file, which the first write opens; None for
                ``$FINETUNE_SIGNING_KEY``, without which nothing is signed.
            trust: the trust policy, or its file; None for ``$FINETUNE_TRUST`` or ``~/.finetune/trust.yaml``, without
                which no signature is asked for.

        Raises:
            StoreError: there is no such kind of location, or something that it needs is missing.
        """
        self.location = str(location or default_location())
        self.store = open_store(self.location)
        # Every registry in memory is another one.
        place = f"memory://{uuid.uuid4().hex}" if isinstance(self.store, MemoryStore) else self.location
        self.guard = Guard.configured(place, signer=signer, trust=trust)
        self._is_registry = False
        self._logs: dict[str, Log] = {}

    def resolve(self, ref: str | AdapterRef) -> Version:
        """Return the version that a reference means now.

        An alias never gives a yanked version. An exact version or digest does, with a ``warning`` in it.

        Raises:
            AdapterReferenceError: it is no reference.
            NotFoundError: there is no such adapter, version or alias; with those that there are.
            YankedError: the alias stands for a yanked version, or every version is yanked.
            TrustError: the namespace requires signatures, and the log does not vouch for the version, or is older than
                one that was seen before.
        """
        ref = AdapterRef.parse(ref) if isinstance(ref, str) else ref
        log = self._log(ref)
        head = self._head(log, ref)
        # Before anything is made of what the newest entry says, be it an error.
        vouched_for = self.guard.check_head(log, head)
        entry = find(log, head, ref)
        if vouched_for:
            self.guard.check_version(log, head, entry)
        return Version.of(ref, entry, head)

    def pull(self, ref: str | AdapterRef | Version, into: str | Path | None = None) -> Path:
        """Return a folder that holds exactly the manifest and the files of a version, every byte checked.

        Beside them lies ``manifest.sig``, where the version was signed. The folder appears whole or not at all.
        One that is there already, from an earlier pull, is hashed again before it is returned; in the cache it is
        built anew when it is not right.

        Args:
            ref: a reference, or the version that ``resolve`` returned, where its ``warning`` matters.
            into: the folder to make; None for one in ``default_cache()``.

        Raises:
            NotFoundError: there is no such adapter, version or alias.
            YankedError: the alias stands for a yanked version.
            IntegrityError: the registry is damaged.
            StoreError: the folder cannot be written, or ``into`` holds something else or lies in a registry.
            TrustError: the namespace requires signatures, and nobody who may sign there vouches for the version.
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

        A store on this machine is read where it is; a version in any other store is pulled.

        Args:
            ref: a reference, or the version that ``resolve`` returned, where its ``warning`` matters.

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

        An adapter whose log cannot be read does not keep the others out of the list.

        Args:
            namespace: the namespace to list; None for all.
            base: the base to list, by its hub id or the beginning of its digest; None for any.
            task: the task to list; None for any.
            metric: one condition, or several, that must hold, such as ``test.METRIC>=0.7``.
            all_versions: True to return every version instead, the yanked ones too, the oldest of a name first.
            onerror: called with the name of each adapter that cannot be read and is left out, and with the error;
                None warns.

        Raises:
            ConditionError: ``metric`` is no condition.
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
        # Only where the search begins: a listing that is behind makes it longer, not wrong.
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
        """Return the aliases of the adapter ``ns/name``, each with the number of the version that it stands for.

        Those of yanked versions are left out.

        Raises:
            NotFoundError: there is no such adapter.
        """
        ref = AdapterRef.parse_name(name)
        head = self._head(self._log(ref), ref)
        return {alias: version for alias, version in head.aliases.items() if str(version) not in head.yanked}

    def _to_read(self, ref: str | AdapterRef | Version) -> Version:
        """Return the version whose bytes are asked for, once its manifest is vouched for."""
        version = ref if isinstance(ref, Version) else self.resolve(ref)
        self.guard.check_manifest(version)
        return version

    def _open(self, *, create: bool = False) -> bool:
        self._is_registry = self._is_registry or is_registry(self.store)
        if create and not self._is_registry:
            # Servers that take a create for a plain write are many; a folder's links cannot be anything else.
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
