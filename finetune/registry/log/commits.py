"""The commit: one immutable entry in the log of an adapter, with the whole state after it.

Each entry holds the digest of the one before it, so that the newest vouches for all history. Each holds the
whole state (aliases, yanked versions, newest version and its summary), so that the newest alone answers most
questions.
"""

import getpass
import re
import socket
from collections.abc import Container
from datetime import UTC, datetime
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from finetune.adapters.manifest import Sha256, canonical_json, sha256_hex, strict_json
from finetune.adapters.manifest_schema_2 import summary_from_schema_2
from finetune.adapters.reference import LATEST, Alias, VersionNumber, check_name_part
from finetune.core.fields import UtcTime
from finetune.errors import AdapterReferenceError, IntegrityError, ManifestError, RegistryError, plain
from finetune.registry.trust.signing import Signature, SigningKey, entry_message, manifest_message

MAX_COMMIT_BYTES = 1024 * 1024
SCHEMA = 3  # written; registries that were begun with an older one go on
_CHECKSUM = "checksum"  # a key of the bytes, since schema 3
_SINCE = {"yanked": 2, "gate": 3, "manifest_signature": 3, "signature": 3}  # fields that older schemas do not have

Line = Annotated[str, Field(pattern=r"^[^\x00-\x1f\x7f]{1,256}$")]
Txn = Annotated[str, Field(pattern=r"^[0-9a-f]{32}$")]

_LOG_KEY = re.compile(r"names/([^/]+)/([^/]+)/log/((?!0{12})[0-9]{12})\.json")


def log_key(namespace: str, name: str, seq: int) -> str:
    """Return the key of the ``seq``-th entry of an adapter's log."""
    return f"names/{namespace}/{name}/log/{seq:012d}.json"


def hint_key(namespace: str, name: str) -> str:
    """Return the key of the hint of an adapter's log."""
    return f"names/{namespace}/{name}/hint"


def split_log_key(key: str) -> tuple[str, str, int] | None:
    """Return namespace, name and sequence number, or None when ``key`` is no entry of a log."""
    match = _LOG_KEY.fullmatch(key)
    if match is None:
        return None
    try:
        return check_name_part(match[1]), check_name_part(match[2]), int(match[3])
    except AdapterReferenceError:
        return None


def first_problem(error: ValidationError) -> str:
    """Return the place of the first fault, and its message."""
    first = error.errors()[0]
    where = ".".join(str(part) for part in first["loc"]) or "top level"
    return f"{plain(where)}: {plain(first['msg'])}"


def current_actor() -> str:
    """Return ``user@host`` for the log: information, not proof."""
    try:
        user = getpass.getuser()
    except (OSError, KeyError):  # a container whose user has no entry in passwd
        user = "unknown"
    actor = f"{user}@{socket.gethostname()}"
    return "".join(c if c.isprintable() else "?" for c in actor)[:256]


class Gate(BaseModel):
    """The conditions that a version had to meet before an alias was moved to it."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    required: list[Line] = Field(min_length=1, max_length=64)
    # Those that did not hold, with what was found; the alias was moved by force.
    forced: list[Line] = Field(max_length=64)


class Commit(BaseModel):
    """One entry of a log. Frozen and strict: an unknown or missing field is an error."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    schema_version: Literal[1, 2, 3] = 3
    seq: VersionNumber  # place in the log, from 1, without gaps
    prev: Sha256 | None  # of the bytes of the entry before; None for the first
    txn: Txn  # chosen by the writer, who so knows its own entry again
    op: Literal["publish", "alias", "rollback", "yank", "unyank"]
    version: VersionNumber  # number of versions published so far, which is the newest version
    manifest: Sha256  # of the newest version
    # All of them, with the version that each stands for.
    aliases: dict[Alias, VersionNumber] = Field(max_length=1000)
    # All versions that are not to be used any more, each with the reason; JSON has no numbers as keys.
    yanked: dict[Annotated[str, Field(pattern=r"^[1-9][0-9]{0,11}$")], Line] = Field(default={}, max_length=1000)
    summary: dict[str, Any]  # of the newest version's manifest
    expect: dict[Alias, Annotated[int, Field(ge=0)]]  # what had to be true before; 0: no such alias
    gate: Gate | None = None  # what had to hold for the version that the alias was moved to
    actor: Line
    # Information only, for clocks differ; the order is that of seq.
    time: Annotated[UtcTime, Field(pattern=r"Z$")]
    # Over the manifest that this entry publishes; it goes with the files wherever they are copied.
    manifest_signature: Signature | None = None
    # Over namespace, name and everything above. The digest in the next entry is of the signature too: so a history
    # cannot be stripped of its signatures, or signed anew, without its successors showing it.
    signature: Signature | None = None

    @model_validator(mode="after")
    def _holds_together(self) -> "Commit":
        for alias, version in self.aliases.items():
            if version > self.version:
                raise ValueError(f"the alias {alias} stands for {version}, but {self.version} is the newest")
        for number in self.yanked:
            if int(number) > self.version:
                raise ValueError(f"version {number} is yanked, but {self.version} is the newest")
        metrics = self.summary.get("metrics", {})
        if not isinstance(metrics, dict) or not all(isinstance(scores, dict) for scores in metrics.values()):
            raise ValueError("summary: metrics must be scores by when they were measured")
        if self.schema_version == 1 and (self.yanked or self.op not in ("publish", "alias")):
            raise ValueError("schema 1 has no yanked versions, and no op but publish and alias")
        if self.gate is not None and (self.schema_version < 3 or self.op != "alias"):
            raise ValueError("only the op alias has a gate, from schema 3 on")
        if self.op != "publish" and self.manifest_signature is not None:
            raise ValueError(f"manifest_signature: the op {self.op} publishes no manifest")
        latest = self.aliases.get(LATEST)
        if latest is None:
            raise ValueError(f"the alias {LATEST} is missing")
        if latest != (newest := newest_usable(self.version, self.yanked)):
            raise ValueError(f"the alias {LATEST} stands for {latest}, but it has to stand for {newest}")
        return self

    @classmethod
    def after(cls, head: "Commit | None", *, op: str, txn: str, **changes: Any) -> "Commit":
        """Return the entry that follows ``head``, written here and now.

        Args:
            head: the newest entry, None when there is none.
            op: the operation.
            txn: the txn that the writer chose.
            **changes: the fields that differ from those of ``head``; ``latest`` follows from them.

        Raises:
            RegistryError: its contents do not fit into a log.
        """
        kept = ("version", "manifest", "summary", "aliases", "yanked")
        fields = {} if head is None else {name: getattr(head, name) for name in kept}
        fields |= {"expect": {}, "yanked": {}, **fields, **changes}
        fields["aliases"] = fields["aliases"] | {LATEST: newest_usable(fields["version"], fields["yanked"])}
        try:
            commit = cls(
                seq=1 if head is None else head.seq + 1,
                prev=None if head is None else head.digest,
                op=op,  # type: ignore[arg-type]
                txn=txn,
                actor=current_actor(),
                time=datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ"),
                **fields,
            )
        except ValidationError as error:
            raise RegistryError(f"this cannot be written to the log: {first_problem(error)}") from None
        return commit.checked()

    @classmethod
    def parse(cls, raw: bytes, *, source: str) -> "Commit":
        """Read an entry from its bytes.

        Args:
            raw: the bytes.
            source: the key, for messages.

        Raises:
            IntegrityError: it is no entry, or not in canonical form.
            RegistryError: it has a newer schema than this program knows.
        """
        try:
            data = strict_json(raw, source=source, max_bytes=MAX_COMMIT_BYTES)
        except ManifestError as error:
            raise IntegrityError(str(error)) from None
        schema = data.get("schema_version") if isinstance(data, dict) else None
        if isinstance(schema, int) and schema > SCHEMA:
            raise RegistryError(
                f"{source}: written with schema {schema}, this program reads up to {SCHEMA}: upgrade finetune"
            )
        checksum = data.pop(_CHECKSUM, None) if isinstance(data, dict) else None
        try:
            commit = cls.model_validate(data)
        except ValidationError as error:
            raise IntegrityError(f"{source}: not a commit: {first_problem(error)}") from None
        # The digest in the next entry is of these bytes; only one spelling may stand for one commit.
        if commit.to_bytes() != raw:
            damaged = "its checksum is not that of what it says, so it was damaged"
            other = "not in the canonical form in which commits are written"
            raise IntegrityError(f"{source}: {other if checksum == commit.checksum else damaged}")
        return commit

    def checked(self) -> "Commit":
        """Return the commit as it will be read; one that nobody can read would end the log for ever.

        Raises:
            RegistryError: its contents do not fit into a log.
        """
        try:
            return Commit.parse(self.to_bytes(), source="the new entry")
        except ValueError as error:
            raise RegistryError(f"this cannot be written to the log: {error}") from None

    def signed(self, key: SigningKey, namespace: str, name: str) -> "Commit":
        """Return the commit with signatures: its own, and of a publish that of the manifest.

        Args:
            key: the key that signs.
            namespace: the namespace of the adapter in whose log it will stand.
            name: the name of that adapter.
        """
        commit = self
        if self.op == "publish":
            commit = commit.model_copy(update={"manifest_signature": key.sign(manifest_message(self.manifest))})
        signature = key.sign(commit.message(namespace, name))
        return commit.model_copy(update={"signature": signature}).checked()

    def message(self, namespace: str, name: str) -> bytes:
        """Return the message that its signature signs, in the log of the adapter ``namespace/name``."""
        fields = {field: value for field, value in self._fields().items() if field != "signature"}
        return entry_message(namespace, name, fields)

    def to_bytes(self) -> bytes:
        """Return the canonical JSON of the commit."""
        fields = self._fields()
        if self.schema_version >= 3:
            fields[_CHECKSUM] = sha256_hex(canonical_json(fields))
        return canonical_json(fields)

    @property
    def checksum(self) -> str | None:
        """SHA-256 of all other fields, which shows damage to the newest entry too; None before schema 3."""
        return sha256_hex(canonical_json(self._fields())) if self.schema_version >= 3 else None

    @property
    def current_summary(self) -> dict[str, Any]:
        """The summary under today's names; an entry of an earlier release has others."""
        return summary_from_schema_2(self.summary)

    def _fields(self) -> dict[str, Any]:
        # Not mode="json", which writes null for a number that is not finite.
        return self.model_dump(exclude={name for name, since in _SINCE.items() if self.schema_version < since})

    @property
    def digest(self) -> str:
        """SHA-256 of the bytes of the commit, which the next one holds as ``prev``."""
        return sha256_hex(self.to_bytes())


def newest_usable(version: int, yanked: Container[str]) -> int:
    """Return the version of ``latest`` when ``version`` is the newest: the newest version that is not yanked.

    Where all are yanked it is the newest, and a request for it is an error.
    """
    return next((number for number in range(version, 0, -1) if str(number) not in yanked), version)
