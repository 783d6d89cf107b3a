"""The registry of adapters: publish, resolve, pull, list, log, alias, rollback, yank, unyank."""

import builtins
import uuid
from collections.abc import Callable, Iterable
from dataclasses import replace
from pathlib import Path

from finetune.adapters.manifest import AdapterManifest, sha256_hex
from finetune.adapters.reference import LATEST, AdapterRef, check_alias, check_name_part, folder_hint
from finetune.errors import AdapterReferenceError, NotFoundError
from finetune.registry.log import changes
from finetune.registry.log.commits import Commit, Gate
from finetune.registry.log.finding import check_exists, find, none_of_that_name, version_before
from finetune.registry.log.guard import Guard
from finetune.registry.log.index import ListIndex, OnError
from finetune.registry.log.listing import every_version, wanted, warn_of_unreadable
from finetune.registry.log.log import Log
from finetune.registry.log.published_before import has_weights, published_before
from finetune.registry.log.version_files import nothing_missing, read_published, read_pulled
from finetune.registry.log.versions import Version
from finetune.registry.storage.adapter_folders import (
    build_folder,
    check_folder,
    has_folder,
    holds,
    keep_signature,
    put_folder,
    read_manifest,
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


class AdapterRegistry:
    """Published adapters: numbered versions that never change, and aliases that move between them.

    Any number of processes may use one registry at the same time. A version exists from the moment its entry stands in
    the log, and then with all its files; before that nothing of it can be seen. Use one object for long: it remembers
    how far each log went.

    Writes are signed where there is a key. ``resolve`` and ``pull`` check versions against the reader's trust policy.
    ``list`` and ``log`` show every entry, whoever wrote it.

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

    def publish(
        self,
        folder: str | Path,
        name: str | None = None,
        *,
        aliases: Iterable[str] = (),
        txn: str | None = None,
    ) -> Version:
        """Publish an adapter folder as the next version of the name in its manifest.

        Args:
            folder: the adapter folder, with ``manifest.json`` and exactly the files that it lists. Files that a
                download from the Hugging Face Hub adds (README.md, .gitattributes, .cache) are not published.
            name: the name ``ns/name`` that the manifest must have; None for any.
            aliases: the aliases that shall stand for the new version, besides ``latest``.
            txn: 32 lower-case hexadecimal digits; give the same ones when this very publish is tried again, so
                that it happens once. With those of ``new_txn`` only the entries that came since are read for
                that; with any others, such as ``uuid.uuid4().hex``, the whole log is. None makes a new version
                in any case.

        Returns:
            The new version, or the one that an earlier try with the same ``txn`` made; with the aliases that
            it was given; without a ``txn`` also with a ``note`` where an earlier version has its bytes or weights.

        Raises:
            AdapterReferenceError: a name or alias is not allowed, or ``name`` is not that of the manifest.
            ManifestError: there is no manifest, or it breaks its schema.
            IntegrityError: the folder does not hold exactly the files of its manifest.
            ConflictError: ``txn`` stands in the log for something else, or gc is deleting what is published.
            StoreError: the store cannot be written; try again with the same ``txn``.
            TrustError: the namespace requires signatures, and there is no key that may sign, or the log is not
                vouched for.
        """
        folder = Path(folder)
        words = [check_alias(alias) for alias in ([aliases] if isinstance(aliases, str) else aliases)]
        raw, manifest = read_manifest(folder)
        ref = AdapterRef.parse_name(manifest.full_name)
        if name is not None and AdapterRef.parse_name(name) != ref:
            raise AdapterReferenceError(
                f"cannot publish {folder} as {name!r}: its manifest says {ref.full_name!r}. "
                "Leave the name out, or save the adapter under the other one."
            )
        check_folder(folder, manifest)
        self.guard.check_signer(ref.namespace)
        self._open(create=True)
        # A try with a txn may be the second one, and reads no more than what came since the first.
        known = txn is None and has_weights(self.store, manifest)
        put_folder(self.store, folder, raw, manifest)
        log = self._log(ref)
        commit = changes.publish(log, sha256_hex(raw), manifest.summary(), words, txn=txn)
        if not has_folder(self.store, raw, manifest):  # gc came, while this machine slept for longer than it waits
            put_folder(self.store, folder, raw, manifest)
        note = published_before(self.store, log, commit, manifest) if known else None
        return replace(Version.of(ref, commit, commit), note=note)

    def new_txn(self, name: str) -> str:
        """Return a ``txn`` for one publish of the adapter ``ns/name``, to be kept until that has succeeded."""
        return changes.new_txn(self._log(AdapterRef.parse_name(name)))

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

    def read(self, ref: str | AdapterRef | Version) -> tuple[AdapterManifest, Callable[[str], bytes]]:
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

    def alias(
        self, name: str, alias: str, target: int | str, *, expect: int | None = None, gate: Gate | None = None
    ) -> Version:
        """Let an alias stand for a version; when it does already, nothing is written.

        Args:
            name: the adapter, ``ns/name``.
            alias: the alias; not ``latest``, which always stands for the newest version that is not yanked.
            target: the number of the version, or any text that may stand after the ``@`` of a reference.
            expect: the version that the alias must stand for now, 0 for none; None to move it from anywhere.
            gate: the conditions that ``promote`` required of the version, and those it was forced past, for the log.

        Returns:
            The version that it stands for now.

        Raises:
            ConflictError: it stands for another version than expected, which is named.
            NotFoundError: there is no such adapter or target.
            YankedError: the target is yanked.
        """
        AdapterRef.parse_name(name)
        ref = AdapterRef.parse(f"{name}@{target}")
        log = self._existing_log(ref)
        return changes.move(
            log, ref, alias, lambda head: find(log, head, ref).version, op="alias", expect=expect, gate=gate
        )

    def rollback(self, name: str, alias: str, to: int | str | None = None, *, expect: int | None = None) -> Version:
        """Move an alias back to where it was before, or to a given version.

        Once more goes one step further back. Yanked versions are passed over.

        Args:
            name: the adapter, ``ns/name``.
            alias: the alias.
            to: the number of the version, or any text that may stand after the ``@`` of a reference; None for the
                version before.
            expect: the version that the alias must stand for now; None for any.

        Returns:
            The version that it stands for now.

        Raises:
            ConflictError: it stands for another version than expected, which is named.
            NotFoundError: there is no such adapter, alias or target, or it never stood for another version.
            YankedError: the target is yanked.
        """
        ref = AdapterRef.parse_name(name)
        ref = ref if to is None else AdapterRef.parse(f"{name}@{to}")
        log = self._existing_log(ref)

        def target(head: Commit) -> int:
            check_exists(head, ref, alias)
            return version_before(log.entries(head), head, ref, alias) if to is None else find(log, head, ref).version

        return changes.move(log, ref, alias, target, op="rollback", expect=expect)

    def yank(self, ref: str | AdapterRef, *, reason: str | None = None) -> Version:
        """Mark a version as not to be used any more; nothing is deleted.

        ``latest`` falls to the newest version that is not yanked. Another alias that stands for the version
        stays, and asking for it is an error until it is moved.

        Args:
            ref: the version, by its number: ``ns/name@17``.
            reason: one line for users who still ask for it; None for none.

        Raises:
            AdapterReferenceError: it is no reference, or has no number: an alias may move meanwhile.
            NotFoundError: there is no such adapter or version.
        """
        ref, log, version = self._existing_version(ref, "yank")
        return changes.yank(log, ref, version, reason=reason)

    def unyank(self, ref: str | AdapterRef) -> Version:
        """Take ``yank`` back; a version that is not yanked stays as it is.

        Raises:
            AdapterReferenceError: it is no reference, or has no number.
            NotFoundError: there is no such adapter or version.
        """
        ref, log, version = self._existing_version(ref, "unyank")
        return changes.unyank(log, ref, version)

    def _to_read(self, ref: str | AdapterRef | Version) -> Version:
        """Return the version whose bytes are asked for, once its manifest is vouched for."""
        version = ref if isinstance(ref, Version) else self.resolve(ref)
        self.guard.check_manifest(version)
        return version

    def _existing_version(self, ref: str | AdapterRef, verb: str) -> tuple[AdapterRef, Log, int]:
        ref = AdapterRef.parse(ref) if isinstance(ref, str) else ref
        if ref.version is None:
            raise AdapterReferenceError(
                f"{ref} does not say the number of a version, such as {ref.full_name}@17; {verb} needs it."
            )
        log = self._log(ref)
        return ref, log, find(log, self._head(log, ref), ref).version

    def _existing_log(self, ref: AdapterRef) -> Log:
        log = self._log(ref)
        self._head(log, ref)
        return log

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
