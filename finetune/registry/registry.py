"""The daily verbs of a registry: publish, resolve, pull, list, log, alias."""

import builtins
import uuid
from collections.abc import Iterable
from pathlib import Path

from finetune.adapters.manifest import sha256_hex
from finetune.adapters.reference import LATEST, AdapterRef, check_alias, check_name_part
from finetune.errors import AdapterReferenceError, ConflictError, IntegrityError, NotFoundError
from finetune.lookup import did_you_mean
from finetune.registry.commits import Commit, Version
from finetune.registry.folders import build_folder, check_folder, holds, put_folder, read_manifest
from finetune.registry.location import default_cache, default_location, is_registry, open_store
from finetune.registry.log import Log, list_logs
from finetune.registry.store import ObjectMissing


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
            folder: holds ``manifest.json`` and exactly the files that it lists.
            name: ``ns/name`` that the manifest must have; None to take it as it is.
            aliases: what shall stand for the new version, besides ``latest``.
            txn: 32 lower-case hexadecimal digits, such as ``uuid.uuid4().hex``; give the same ones when this
                very publish is tried again, so that it happens once. None makes a new version in any case.

        Returns:
            The new version, or the one that an earlier try with the same ``txn`` made; with the aliases that
            it was given.

        Raises:
            AdapterReferenceError: a name or alias is not allowed, or ``name`` is not that of the manifest.
            ManifestError: there is no manifest, or it breaks its schema.
            IntegrityError: the folder is not what its manifest says.
            ConflictError: ``txn`` stands in the log for something else.
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
        commit = self._append_publish(ref, sha256_hex(raw), manifest.summary(), words, txn)
        return Version.of(ref, commit, commit.aliases)

    def resolve(self, ref: str | AdapterRef) -> Version:
        """Returns the version that a reference means now.

        Raises:
            AdapterReferenceError: it is no reference.
            NotFoundError: there is no such adapter, version or alias; with those that there are.
        """
        ref = AdapterRef.parse(ref) if isinstance(ref, str) else ref
        log = self._log(ref)
        head = self._head(log, ref)
        return Version.of(ref, self._find(log, head, ref), head.aliases)

    def pull(self, ref: str | AdapterRef, into: str | Path | None = None) -> Path:
        """Returns a folder that holds exactly the manifest and the files of a version, every byte checked.

        The folder appears whole or not at all. One that is there already, from an earlier pull, is hashed
        again before it is returned; in the cache it is built anew when it is not right.

        Args:
            ref: which version.
            into: the folder to make; None for one in ``default_cache()``.

        Raises:
            NotFoundError: there is no such adapter, version or alias.
            IntegrityError: the registry is damaged.
            StoreError: the folder cannot be written, or ``into`` holds something else.
        """
        version = self.resolve(ref)
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

    def list(self, namespace: str | None = None) -> builtins.list[Version]:
        """Returns the newest version of every adapter, by name.

        Args:
            namespace: only those in it; None for all.
        """
        if namespace is not None:
            check_name_part(namespace)
        versions: builtins.list[Version] = []
        if not self._open():
            return versions
        for (space, name), entries in list_logs(self.store, namespace).items():
            ref = AdapterRef(namespace=space, name=name, alias=LATEST)
            log = self._log(ref)
            # Only where the search begins: a listing that is behind makes it longer, not wrong.
            log.known = max(log.known, entries[-1])
            head = self._head(log, ref)
            versions.append(Version.of(ref, self._find(log, head, ref), head.aliases))
        return versions

    def log(self, name: str) -> builtins.list[Commit]:
        """Returns everything that ever happened to the adapter ``ns/name``, the oldest first.

        Raises:
            NotFoundError: there is no such adapter.
        """
        ref = AdapterRef.parse_name(name)
        log = self._log(ref)
        return [*log.entries(self._head(log, ref))]

    def alias(self, name: str, alias: str, target: int | str, *, expect: int | None = None) -> Version:
        """Lets an alias stand for a version; when it does already, nothing is written.

        Args:
            name: the adapter, ``ns/name``.
            alias: the word; ``latest`` is moved by publish only.
            target: number of the version, or what may stand after the ``@`` of a reference.
            expect: the version that the alias must stand for now, 0 for none; None to move it from anywhere.

        Returns:
            The version it stands for now.

        Raises:
            ConflictError: it stands for another version than expected, which is named.
            NotFoundError: there is no such adapter or target.
        """
        AdapterRef.parse_name(name)
        if check_alias(alias) == LATEST:
            raise AdapterReferenceError(f"the alias {LATEST!r} is moved by publish only; choose another word.")
        ref = AdapterRef.parse(f"{name}@{target}")
        log, txn = self._log(ref), uuid.uuid4().hex

        def make(head: Commit | None) -> Commit:
            head = head or self._head(log, ref)
            now, found = head.aliases.get(alias, 0), self._find(log, head, ref)
            if expect is not None and now != expect:
                raise ConflictError(
                    f"{ref.full_name}: the alias {alias!r} was expected to stand for {_show(expect)}, but "
                    f"stands for {_show(now)} (entry {head.seq}, by {head.actor}). Nothing was changed."
                )
            if now == found.version:
                return head
            return Commit.after(
                head,
                txn=txn,
                op="alias",
                version=head.version,
                manifest=head.manifest,
                aliases=head.aliases | {alias: found.version},
                summary=head.summary,
                expect={} if expect is None else {alias: expect},
            )

        commit = log.append(make)
        return Version.of(ref, log.find_version(commit.aliases[alias], commit), commit.aliases)

    def _append_publish(
        self, ref: AdapterRef, digest: str, summary: dict, aliases: builtins.list[str], txn: str | None
    ) -> Commit:
        log, mine = self._log(ref), uuid.uuid4().hex if txn is None else txn
        searched = 0

        def make(head: Commit | None) -> Commit:
            nonlocal searched
            if head is not None and txn is not None:
                done = log.find_txn(mine, head, above=searched)
                searched = head.seq
                if done is not None:
                    return done
            version = 1 if head is None else head.version + 1
            moved = dict.fromkeys([*aliases, LATEST], version)
            return Commit.after(
                head,
                txn=mine,
                op="publish",
                version=version,
                manifest=digest,
                aliases=moved if head is None else head.aliases | moved,
                summary=summary,
                expect={},
            )

        commit = log.append(make)
        if (commit.op, commit.manifest) != ("publish", digest):
            raise ConflictError(
                f"{ref.full_name}: the txn {mine} is that of entry {commit.seq}, which did something else. "
                "Use a new one for another publish."
            )
        return commit

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

    def _find(self, log: Log, head: Commit, ref: AdapterRef) -> Commit:
        """Returns the entry that published what ``ref`` means when ``head`` is the newest entry."""
        number = ref.version if ref.alias is None else head.aliases.get(ref.alias)
        if number is not None and number <= head.version:
            return log.find_version(number, head)
        found = None if ref.digest is None else log.find_digest(ref.digest, head)
        if found is None:
            hint = "" if ref.alias is None else did_you_mean(ref.alias, head.aliases)
            versions = "version 1" if head.version == 1 else f"versions 1 to {head.version}"
            aliases = ", ".join(f"{alias} ({version})" for alias, version in sorted(head.aliases.items()))
            raise NotFoundError(f"{ref} does not exist.{hint} There are {versions}, and the aliases {aliases}.")
        return found


def _show(version: int) -> str:
    return f"version {version}" if version else "none"
