"""The registry of adapters: the methods of a reader, and publish, alias, rollback, yank, unyank."""

from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path

from finetune.adapters.manifest import sha256_hex
from finetune.adapters.reference import AdapterRef, check_alias
from finetune.errors import AdapterReferenceError
from finetune.registry.log import changes
from finetune.registry.log.commits import Commit, Gate
from finetune.registry.log.finding import check_exists, find, version_before
from finetune.registry.log.log import Log
from finetune.registry.log.published_before import has_weights, published_before
from finetune.registry.log.versions import Version
from finetune.registry.reader import RegistryReader
from finetune.registry.storage.adapter_folders import (
    check_folder,
    has_folder,
    put_folder,
    read_manifest,
)


class AdapterRegistry(RegistryReader):
    """Published adapters: numbered versions that never change, and aliases that move between them.

    Any number of processes may use one registry at the same time. A version exists, with all its files, from the moment
    its entry is in the log; before that no reader can see it. Keep one object for a long time: it remembers the
    newest entry of each log.

    Writes are signed when there is a key. ``resolve`` and ``pull`` check versions against the reader's trust policy.
    ``list`` and ``log`` show all entries without a check of their signatures.

    Attributes:
        location: the folder, or the URL, of the registry.
        store: the store with the bytes of the registry.
        guard: the trust policy, the rollback protection and the signing key.
    """

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
            aliases: the aliases to move to the new version, besides ``latest``.
            txn: 32 lower-case hexadecimal digits; give the same ``txn`` when you try this publish again, so that it
                happens once. For a ``txn`` of ``new_txn`` only the entries since then are searched; for any other,
                such as ``uuid.uuid4().hex``, the whole log. None always makes a new version.

        Returns:
            The new version, or that of an earlier try with the same ``txn``, with its aliases. Without a ``txn`` it has
            a ``note`` when an earlier version has the same bytes or weights.

        Raises:
            AdapterReferenceError: a name or alias is not allowed, or ``name`` is not that of the manifest.
            ManifestError: the manifest is missing, or breaks its schema.
            IntegrityError: the folder does not hold exactly the files of its manifest.
            ConflictError: an entry for another change has ``txn`` already, or gc is deleting blobs of the version.
            StoreError: the store cannot be written; try again with the same ``txn``.
            TrustError: the namespace requires signatures, and no key is given that may sign there, or the newest entry
                of the log has no accepted signature.
        """
        folder = Path(folder)
        words = [check_alias(alias) for alias in ([aliases] if isinstance(aliases, str) else aliases)]
        raw, manifest = read_manifest(folder)
        ref = AdapterRef.parse_name(manifest.full_name)
        if name is not None and AdapterRef.parse_name(name) != ref:
            raise AdapterReferenceError(
                f"cannot publish {folder} as {name!r}: its manifest names {ref.full_name!r}. "
                f"Leave the name out, or save the adapter as {name!r}."
            )
        check_folder(folder, manifest)
        self.guard.check_signer(ref.namespace)
        self._open(create=True)
        # A publish with a txn may be a second try, and reads only the entries since the first.
        known = txn is None and has_weights(self.store, manifest)
        put_folder(self.store, folder, raw, manifest)
        log = self._log(ref)
        commit = changes.publish(log, sha256_hex(raw), manifest.summary(), words, txn=txn)
        if not has_folder(self.store, raw, manifest):  # gc ran while this machine slept
            put_folder(self.store, folder, raw, manifest)
        note = published_before(self.store, log, commit, manifest) if known else None
        return replace(Version.of(ref, commit, commit), note=note)

    def new_txn(self, name: str) -> str:
        """Return a ``txn`` for one publish of the adapter ``ns/name``; keep it until the publish has succeeded."""
        return changes.new_txn(self._log(AdapterRef.parse_name(name)))

    def alias(
        self, name: str, alias: str, target: int | str, *, expect: int | None = None, gate: Gate | None = None
    ) -> Version:
        """Move an alias to a version; when it points there already, nothing is written.

        Args:
            name: the adapter, ``ns/name``.
            alias: the alias; not ``latest``, which always points to the newest version that is not yanked.
            target: the number of the version, or any text that is allowed after the ``@`` of a reference.
            expect: the version that the alias must point to now, 0 for no such alias; None for any.
            gate: the conditions that ``promote`` checked, and those that it ignored by ``force``, for the log.

        Returns:
            The version that the alias points to now.

        Raises:
            ConflictError: the alias does not point to the expected version; the message names both.
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
        """Move an alias back to the version before, or to a given version.

        A second rollback moves it one step further back. Yanked versions are skipped.

        Args:
            name: the adapter, ``ns/name``.
            alias: the alias.
            to: the number of the version, or any text that is allowed after the ``@`` of a reference; None for the
                version before.
            expect: the version that the alias must point to now; None for any.

        Returns:
            The version that the alias points to now.

        Raises:
            ConflictError: the alias does not point to the expected version; the message names both.
            NotFoundError: there is no such adapter, alias or target, or the alias never pointed to another version.
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
        """Withdraw a version; nothing is deleted.

        ``latest`` moves to the newest version that is not yanked. Another alias of the version stays, and resolving it
        is an error until it is moved.

        Args:
            ref: the version, by its number: ``ns/name@17``.
            reason: one line for users who still resolve the version; None for no reason.

        Raises:
            AdapterReferenceError: ``ref`` is not a reference, or has no number: an alias may move meanwhile.
            NotFoundError: there is no such adapter or version.
        """
        ref, log, version = self._existing_version(ref, "yank")
        return changes.yank(log, ref, version, reason=reason)

    def unyank(self, ref: str | AdapterRef) -> Version:
        """Undo ``yank``; a version that is not yanked stays unchanged.

        Raises:
            AdapterReferenceError: ``ref`` is not a reference, or has no number.
            NotFoundError: there is no such adapter or version.
        """
        ref, log, version = self._existing_version(ref, "unyank")
        return changes.unyank(log, ref, version)

    def _existing_version(self, ref: str | AdapterRef, verb: str) -> tuple[AdapterRef, Log, int]:
        ref = AdapterRef.parse(ref) if isinstance(ref, str) else ref
        if ref.version is None:
            raise AdapterReferenceError(f"{verb} needs the number of a version, such as {ref.full_name}@17, got {ref}.")
        log = self._log(ref)
        return ref, log, find(log, self._head(log, ref), ref).version

    def _existing_log(self, ref: AdapterRef) -> Log:
        log = self._log(ref)
        self._head(log, ref)
        return log
