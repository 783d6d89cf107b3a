"""The registry of adapters: what a reader may do, and publish, alias, rollback, yank, unyank."""

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
