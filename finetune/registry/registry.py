"""The daily verbs of a registry: publish, resolve, pull, list, log, alias, rollback, yank, unyank."""

import builtins
from collections.abc import Iterable
from pathlib import Path

from finetune.adapters.manifest import sha256_hex
from finetune.adapters.reference import LATEST, AdapterRef, check_alias, check_name_part
from finetune.errors import AdapterReferenceError, IntegrityError, NotFoundError
from finetune.lookup import did_you_mean
from finetune.registry import changes
from finetune.registry.commits import Commit, Gate
from finetune.registry.finding import check_exists, find, version_before
from finetune.registry.folders import build_folder, check_folder, has_folder, holds, put_folder, read_manifest
from finetune.registry.index import ListIndex, wanted
from finetune.registry.location import default_cache, default_location, is_registry, open_store, registry_uuid
from finetune.registry.log import Log, list_logs
from finetune.registry.store import ObjectMissing, exists
from finetune.registry.versions import Version


class AdapterRegistry:
    """Published adapters: numbered versions that never change, and aliases that move between them.

    Any number of processes may use one registry at the same time. A version exists from the moment its entry
    stands in the log, and then with all its files; before that nothing of it can be seen. Keep one object for
    long: it remembers how far each log went.

    Attributes:
        location: the folder.
        store: the bytes below it.
    """

    def __init__(self, location: str | Path | None = None) -> None:
        """Opens a registry; the folder is made by the first publish.

        Args:
            location: the folder; None for ``default_location()``.

        Raises:
            StoreError: the location is a URL.
        """
        self.location = str(location or default_location())
        self.store = open_store(self.location)
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
        """Publishes an adapter folder as the next version of the name in its manifest.

        Args:
            folder: holds ``manifest.json`` and exactly the files that it lists; what a download from the
                Hugging Face Hub adds (README.md, .gitattributes, .cache) may be there, and is not published.
            name: ``ns/name`` that the manifest must have; None to take it as it is.
            aliases: what shall stand for the new version, besides ``latest``.
            txn: 32 lower-case hexadecimal digits; give the same ones when this very publish is tried again, so
                that it happens once. With those of ``new_txn`` only the entries that came since are read for
                that; with any others, such as ``uuid.uuid4().hex``, the whole log is. None makes a new version
                in any case.

        Returns:
            The new version, or the one that an earlier try with the same ``txn`` made; with the aliases that
            it was given.

        Raises:
            AdapterReferenceError: a name or alias is not allowed, or ``name`` is not that of the manifest.
            ManifestError: there is no manifest, or it breaks its schema.
            IntegrityError: the folder is not what its manifest says.
            ConflictError: ``txn`` stands in the log for something else, or gc is deleting what is published.
            StoreError: the store cannot be written; try again with the same ``txn``.
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
        self._open(create=True)
        put_folder(self.store, folder, raw, manifest)
        commit = changes.publish(self._log(ref), sha256_hex(raw), manifest.summary(), words, txn=txn)
        if not has_folder(self.store, raw, manifest):  # gc came, while this machine slept for longer than it waits
            put_folder(self.store, folder, raw, manifest)
        return Version.of(ref, commit, commit)

    def new_txn(self, name: str) -> str:
        """Returns a ``txn`` for one publish of the adapter ``ns/name``, to be kept until that has succeeded."""
        return changes.new_txn(self._log(AdapterRef.parse_name(name)))

    def resolve(self, ref: str | AdapterRef) -> Version:
        """Returns the version that a reference means now.

        An alias never gives a yanked version. An exact version or digest does, with a ``warning`` in it.

        Raises:
            AdapterReferenceError: it is no reference.
            NotFoundError: there is no such adapter, version or alias; with those that there are.
            YankedError: the alias stands for a yanked version, or every version is yanked.
        """
        ref = AdapterRef.parse(ref) if isinstance(ref, str) else ref
        log = self._log(ref)
        head = self._head(log, ref)
        return Version.of(ref, find(log, head, ref), head)

    def pull(self, ref: str | AdapterRef | Version, into: str | Path | None = None) -> Path:
        """Returns a folder that holds exactly the manifest and the files of a version, every byte checked.

        The folder appears whole or not at all. One that is there already, from an earlier pull, is hashed
        again before it is returned; in the cache it is built anew when it is not right.

        Args:
            ref: which version; what ``resolve`` returned, where its ``warning`` matters.
            into: the folder to make; None for one in ``default_cache()``.

        Raises:
            NotFoundError: there is no such adapter, version or alias.
            YankedError: the alias stands for a yanked version.
            IntegrityError: the registry is damaged.
            StoreError: the folder cannot be written, or ``into`` holds something else.
        """
        version = ref if isinstance(ref, Version) else self.resolve(ref)
        target = default_cache() / version.digest if into is None else Path(into).expanduser().absolute()
        if not holds(target, version.digest):
            try:
                build_folder(self.store, version.digest, version.full_name, target, replace=into is None)
            except ObjectMissing as error:
                raise IntegrityError(
                    f"{version.ref} cannot be pulled, the registry is damaged: {error}. "
                    "See what else is with `finetune registry verify`."
                ) from None
        return target

    def list(
        self,
        namespace: str | None = None,
        *,
        base: str | None = None,
        task: str | None = None,
        metric: str | Iterable[str] = (),
        all_versions: bool = False,
    ) -> builtins.list[Version]:
        """Returns the latest version of every adapter, by name.

        Args:
            namespace: only those in it; None for all.
            base: only those of this base: its hub id, or the beginning of its digest; None for any.
            task: only those trained for it; None for any.
            metric: conditions that must hold, such as ``after.exact_match>=0.7``; one, or several.
            all_versions: every version instead, the yanked ones too, the oldest of a name first.

        Raises:
            ConditionError: ``metric`` is no condition.
        """
        if namespace is not None:
            check_name_part(namespace)
        versions: builtins.list[Version] = []
        if self._open():
            index = ListIndex(registry_uuid(self.store), self.location)
            versions = self._all(namespace) if all_versions else index.latest(self.store, namespace, self._latest)
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

    def _all(self, namespace: str | None) -> builtins.list[Version]:
        versions: builtins.list[Version] = []
        for space, name in list_logs(self.store, namespace):
            ref = AdapterRef(namespace=space, name=name, alias=LATEST)
            entries = self.log(ref.full_name)
            versions.extend(Version.of(ref, entry, entries[-1]) for entry in entries if entry.op == "publish")
        return versions

    def log(self, name: str) -> builtins.list[Commit]:
        """Returns everything that ever happened to the adapter ``ns/name``, the oldest first.

        Raises:
            NotFoundError: there is no such adapter.
        """
        ref = AdapterRef.parse_name(name)
        log = self._log(ref)
        return [*log.entries(self._head(log, ref))]

    def alias(
        self, name: str, alias: str, target: int | str, *, expect: int | None = None, gate: Gate | None = None
    ) -> Version:
        """Lets an alias stand for a version; when it does already, nothing is written.

        Args:
            name: the adapter, ``ns/name``.
            alias: the word; not ``latest``, which always stands for the newest version that is not yanked.
            target: number of the version, or what may stand after the ``@`` of a reference.
            expect: the version that the alias must stand for now, 0 for none; None to move it from anywhere.
            gate: for the log: what ``promote`` required of the version, and what it was forced past.

        Returns:
            The version it stands for now.

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
        """Moves an alias back to where it was before, or to a given version.

        Once more goes one step further back. Yanked versions are passed over.

        Args:
            name: the adapter, ``ns/name``.
            alias: the word.
            to: number of the version, or what may stand after the ``@`` of a reference; None for where it was.
            expect: the version that the alias must stand for now; None for any.

        Returns:
            The version it stands for now.

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
        """Marks a version as not to be used any more; nothing is deleted.

        ``latest`` falls to the newest version that is not yanked. Another alias that stands for the version
        stays, and asking for it is an error until it is moved.

        Args:
            ref: the version, by its number: ``ns/name@17``.
            reason: for whoever still asks for it, one line.

        Raises:
            AdapterReferenceError: it is no reference, or says no number: an alias may move meanwhile.
            NotFoundError: there is no such adapter or version.
        """
        ref, log, version = self._existing_version(ref, "yank")
        return changes.yank(log, ref, version, reason=reason)

    def unyank(self, ref: str | AdapterRef) -> Version:
        """Takes ``yank`` back; a version that is not yanked stays as it is.

        Raises:
            AdapterReferenceError: it is no reference, or says no number.
            NotFoundError: there is no such adapter or version.
        """
        ref, log, version = self._existing_version(ref, "unyank")
        return changes.unyank(log, ref, version)

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
        self._is_registry = self._is_registry or is_registry(self.store, create=create)
        return self._is_registry

    def _log(self, ref: AdapterRef) -> Log:
        return self._logs.setdefault(ref.full_name, Log(self.store, ref.namespace, ref.name))

    def _head(self, log: Log, ref: AdapterRef) -> Commit:
        if not self._open():
            raise NotFoundError(
                f"no adapter {ref.full_name!r}: there is no registry at {self.location}. The first publish makes one."
            )
        head = log.head()
        if head is None:
            names = ["/".join(parts) for parts in list_logs(self.store)]
            shown = ", ".join(names[:20]) + (f" and {len(names) - 20} more" if len(names) > 20 else "")
            raise NotFoundError(
                f"no adapter {ref.full_name!r} in {self.location}.{did_you_mean(ref.full_name, names)} "
                f"It holds: {shown or 'nothing yet'}."
            )
        return head
