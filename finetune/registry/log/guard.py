"""The guard of a registry: its trust policy, its rollback protection, and its signing key.

The newest entry of a log holds all aliases. So a key of the namespace must have signed it, and it must not be older
than the newest entry seen before. Such a key must also have signed the entry that published a version and its manifest.
"""

import contextlib
import os
import warnings
from collections.abc import Iterator
from functools import cached_property
from pathlib import Path
from typing import Protocol

from finetune.adapters.manifest import AdapterManifest, sha256_hex
from finetune.core.outside_text import safe_line
from finetune.errors import StoreError, TrustError
from finetune.registry.log.commits import Commit
from finetune.registry.log.versions import Version
from finetune.registry.storage.adapter_folders import check_folder, read_manifest, read_signature
from finetune.registry.storage.store import ObjectMissing
from finetune.registry.trust.key_files import KEY_VARIABLE, asks_for_passphrase
from finetune.registry.trust.policy import (
    NOT_SIGNED,
    TRUST_VARIABLE,
    Demand,
    PolicyFile,
    TrustPolicy,
    Verdict,
    default_policy_path,
)
from finetune.registry.trust.rollback_protection import SeenEntries
from finetune.registry.trust.signing import SigningKey, manifest_message


class GuardedLog(Protocol):
    """The part of a log that a guard looks at."""

    namespace: str
    name: str

    def read(self, seq: int) -> Commit:
        """Return an entry by its number."""


class Guard:
    """The checks of the entries that a registry relies on, and the signatures of those that it writes."""

    def __init__(
        self, location: str, *, signer: SigningKey | Path | None = None, trust: TrustPolicy | PolicyFile
    ) -> None:
        """Make a guard; nothing is read yet.

        Args:
            location: the location of the registry, to which the seen entries belong.
            signer: the key, or its file, which is opened by the first write; None signs nothing.
            trust: the trust policy, or its file.
        """
        self.location = location
        self._signer = signer
        self._trust = trust

    @classmethod
    def configured(
        cls, location: str, *, signer: SigningKey | str | Path | None, trust: TrustPolicy | str | Path | None
    ) -> "Guard":
        """Return the guard of a registry; the environment replaces arguments that are None.

        Args:
            location: the location of the registry.
            signer: a key or its file; None for ``$FINETUNE_SIGNING_KEY``, without which nothing is signed.
            trust: a policy or its file; None for ``$FINETUNE_TRUST`` or ``~/.finetune/trust.yaml``, where there is one.
        """
        signer = signer or os.environ.get(KEY_VARIABLE) or None
        policy: TrustPolicy | PolicyFile
        if isinstance(trust, TrustPolicy):
            policy = trust
        elif trust is None:
            policy = PolicyFile(default_policy_path(), optional=not os.environ.get(TRUST_VARIABLE))
        else:
            policy = PolicyFile(Path(trust))
        return cls(location, signer=Path(signer) if isinstance(signer, str) else signer, trust=policy)

    @property
    def policy(self) -> TrustPolicy:
        """The present trust policy.

        Raises:
            TrustError: the file of the policy is missing, is not valid, or others can change it.
        """
        return self._trust.read() if isinstance(self._trust, PolicyFile) else self._trust

    @cached_property
    def seen(self) -> SeenEntries:
        """The newest entries that this user has seen."""
        return SeenEntries(self.location)

    def verify_entry(self, namespace: str, name: str, entry: Commit) -> Verdict:
        """Return the verdict on the signature of an entry in the log of ``namespace/name``."""
        return self.policy.verify_signature(namespace, entry.signature, entry.message(namespace, name))

    def verify_folder(self, folder: Path) -> tuple[AdapterManifest, Verdict]:
        """Return the manifest of a folder, and the verdict on the signature beside it, without a registry.

        Args:
            folder: a folder that was pulled, copied or downloaded.

        Raises:
            ManifestError: there is no manifest, or it breaks its schema.
            IntegrityError: the folder does not hold exactly the files of its manifest.
            TrustError: its ``manifest.sig`` does not hold a signature.
        """
        raw, manifest = read_manifest(folder)
        check_folder(folder, manifest)
        message = manifest_message(sha256_hex(raw))
        return manifest, self.policy.verify_signature(manifest.namespace, read_signature(folder), message)

    def check_head(self, log: GuardedLog, head: Commit | None) -> bool:
        """Refuse a newest entry without an accepted signature, or older than one seen before; ``warn`` only warns.

        Args:
            log: the log.
            head: its newest entry; None when it is empty.

        Returns:
            False after a warning, so that the caller gives no second one about the same log; else True.

        Raises:
            TrustError: the namespace requires signatures, and the entry is refused.
        """
        with self._demand(log.namespace) as demand:
            if demand != "off":
                self._check_head(log, head)
            return True
        return False

    def check_version(self, log: GuardedLog, head: Commit, entry: Commit) -> None:
        """Refuse a version whose entry or manifest has no accepted signature; ``warn`` only warns.

        Args:
            log: the log.
            head: its newest entry, which ``check_head`` accepted.
            entry: the entry that published the version.

        Raises:
            TrustError: the namespace requires signatures, and the version is refused.
        """
        with self._demand(log.namespace) as demand:
            if demand == "off":
                return
            if entry.digest != head.digest:
                self._check_entry(log, entry)
            self._check_manifest(log.namespace, log.name, entry.manifest, entry.manifest_signature)

    def check_manifest(self, version: Version) -> None:
        """Refuse a version whose manifest has no accepted signature, also one from a listing, which checks nothing.

        Where the namespace only warns, ``check_version`` has warned already.

        Raises:
            TrustError: the namespace requires signatures, and the version is refused.
        """
        if self.policy.of(version.namespace).signatures == "require":
            self._check_manifest(version.namespace, version.name, version.digest, version.signature)

    def check_signer(self, namespace: str, *, unlock: bool = True) -> SigningKey | None:
        """Return the key that signs writes in a namespace; None for no signature.

        Args:
            namespace: the namespace of the adapter.
            unlock: True to let the user type a passphrase; False to return None for a key that needs one.

        Raises:
            TrustError: the namespace requires signatures, and no key is given, or the key may not sign there.
        """
        requires = self.policy.of(namespace).signatures == "require"
        if self._signer is None:
            if requires:
                raise TrustError(
                    f"{self._source} requires signatures in the namespace {namespace!r}, and there is no key to sign "
                    f"with. Give the file of a key with --sign-with or {KEY_VARIABLE}. Nothing was written."
                )
            return None
        if not isinstance(self._signer, SigningKey):
            if not unlock and asks_for_passphrase(self._signer):
                return None
            self._signer = SigningKey.load(self._signer)
        if requires and (refusal := self.policy.refusal(namespace, self._signer.id)):
            raise TrustError(
                f"the signing key must be one that {self._source} accepts in the namespace {namespace!r}, got "
                f"{refusal}. Nothing was written."
            )
        return self._signer

    def seal(self, log: GuardedLog, commit: Commit) -> Commit:
        """Return an entry ready to be written: signed, where there is a key.

        Raises:
            TrustError: as for ``check_signer``.
        """
        key = self.check_signer(log.namespace)
        return commit if key is None else commit.signed(key, log.namespace, log.name)

    def remember(self, log: GuardedLog, entry: Commit) -> None:
        """Remember an entry as seen, if the policy checks signatures there and accepts that of the entry."""
        with self._demand(log.namespace) as demand:
            if demand != "off" and self.verify_entry(log.namespace, log.name, entry).problem is None:
                self.seen.remember(f"{log.namespace}/{log.name}", entry.seq, entry.digest)

    @contextlib.contextmanager
    def _demand(self, namespace: str) -> Iterator[Demand]:
        """Yield the demand of a namespace; where that is ``warn``, a refusal inside the block becomes a warning."""
        demand = self.policy.of(namespace).signatures
        try:
            yield demand
        except (TrustError, StoreError) as error:
            if demand != "warn":
                raise
            warnings.warn(safe_line(str(error)), stacklevel=4)

    def _check_head(self, log: GuardedLog, head: Commit | None) -> None:
        if head is not None:
            self._check_entry(log, head)
        full_name = f"{log.namespace}/{log.name}"
        seen = self.seen.newest(full_name)
        if problem := contradiction(log, head, seen):
            raise TrustError(
                f"{full_name} in {self.location}: {problem}. If that is expected, as after a restored backup, run "
                f"`finetune registry forget {full_name}`."
            )
        # An unsigned entry is never remembered: a forged one would make every genuine entry look old.
        if head is not None and (seen is None or seen[0] < head.seq):
            self.seen.remember(full_name, head.seq, head.digest)

    def _check_entry(self, log: GuardedLog, entry: Commit) -> None:
        if problem := self.verify_entry(log.namespace, log.name, entry).problem:
            self._refuse(log.namespace, log.name, f"entry {entry.seq} of its log ({entry.op})", problem)

    def _check_manifest(self, namespace: str, name: str, digest: str, signature: str | None) -> None:
        if problem := self.policy.verify_signature(namespace, signature, manifest_message(digest)).problem:
            self._refuse(namespace, name, f"the manifest sha256:{digest}", problem)

    def _refuse(self, namespace: str, name: str, what: str, problem: str) -> None:
        keys = ", ".join(self.policy.of(namespace).keys)
        raise TrustError(
            f"{namespace}/{name}: {what}: {problem}. In the namespace {namespace!r} {self._source} accepts: {keys}. "
            f"`finetune registry log {namespace}/{name}` shows who signed what.{_going_on(problem)}"
        )

    @property
    def _source(self) -> str:
        where = f" {self._trust.path}" if isinstance(self._trust, PolicyFile) else ""
        return f"the trust policy{where}"


def _going_on(problem: str) -> str:
    """Return a hint how to sign a history that was written before the policy required signatures."""
    if problem != NOT_SIGNED:
        return ""
    return (
        " If it is older than the policy and you trust it, sign it now. Set `signatures: warn` in a copy of the policy "
        f"({TRUST_VARIABLE}=COPY) and give the key ({KEY_VARIABLE}). Then `finetune registry pull` the version, and "
        "`publish` the folder again with its alias. The first signed entry covers all aliases (docs/threat-model.md)."
    )


UNGUARDED = Guard("", trust=TrustPolicy())


def contradiction(log: GuardedLog, head: Commit | None, seen: tuple[int, str] | None) -> str | None:
    """Return the contradiction between a log and the entry of it seen before; None when the log continues it.

    Args:
        log: the log.
        head: its newest entry; None when it is empty.
        seen: the number and digest of the newest entry that was seen; None for none.
    """
    if seen is None:
        return None
    number, digest = seen
    if head is None or head.seq < number:
        return (
            f"its newest entry is {head.seq if head else 'gone'}, but entry {number} (sha256:{digest}) was seen here "
            "before. The registry never deletes an entry, so this is an older state of the log"
        )
    try:
        now = head.digest if head.seq == number else head.prev if head.seq == number + 1 else log.read(number).digest
    except ObjectMissing:
        return f"its entry {number} was seen here before, and is gone"
    if now == digest:
        return None
    return f"its entry {number} is sha256:{now}, but sha256:{digest} was seen here before, so this is another log"
