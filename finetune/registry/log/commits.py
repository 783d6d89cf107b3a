"""The commit: one immutable entry in the log of an adapter, with the whole state after it.

Each entry holds the digest of the one before it, so the newest entry fixes the whole history. Each entry holds the
whole state (aliases, yanked versions, newest version and its summary), so the newest entry alone answers most
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
SCHEMA = 3  # of new entries; a registry may hold entries of older schemas too
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
    """Return namespace, name and sequence number, or None when ``key`` is not a log entry."""
    match = _LOG_KEY.fullmatch(key)
    if match is None:
        return None
    try:
        return check_name_part(match[1]), check_name_part(match[2]), int(match[3])
    except AdapterReferenceError:
        return None


def first_problem(error: ValidationError) -> str:
    """Return the field of the first error, and the message."""
    first = error.errors()[0]
    where = ".".join(str(part) for part in first["loc"]) or "top level"
    return f"{plain(where)}: {plain(first['msg'])}"


def current_actor() -> str:
    """Return ``user@host`` for the log; nothing proves it."""
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
    # The conditions that did not hold, each with the value found; the alias was moved by force.
    forced: list[Line] = Field(max_length=64)


class Commit(BaseModel):
    """One entry of a log. Frozen and strict: an unknown or missing field is an error."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    schema_version: Literal[1, 2, 3] = 3
    seq: VersionNumber  # place in the log, from 1, without gaps
    prev: Sha256 | None  # of the bytes of the entry before; None for the first
    txn: Txn  # chosen by the writer, who recognizes its own entry by it
    op: Literal["publish", "alias", "rollback", "yank", "unyank"]
    version: VersionNumber  # number of versions published so far, which is the newest version
    manifest: Sha256  # of the newest version
    # All aliases, each with the version that it points to.
    aliases: dict[Alias, VersionNumber] = Field(max_length=1000)
    # All yanked versions, each with the reason. The keys are texts, because JSON has no numbers as keys.
    yanked: dict[Annotated[str, Field(pattern=r"^[1-9][0-9]{0,11}$")], Line] = Field(default={}, max_length=1000)
    summary: dict[str, Any]  # of the newest version's manifest
    expect: dict[Alias, Annotated[int, Field(ge=0)]]  # the version that an alias had to point to before; 0: none
    gate: Gate | None = None  # the conditions on the version that the alias was moved to
    actor: Line
    # Information only, because clocks differ; ``seq`` gives the order.
    time: Annotated[UtcTime, Field(pattern=r"Z$")]
    # Over the manifest that this entry publishes; it is copied with the files.
    manifest_signature: Signature | None = None
    # Over namespace, name and everything above. The digest in the next entry covers the signature too, so a
    # removed or replaced signature is detected.
    signature: Signature | None = None

    @model_validator(mode="after")
    def _require_consistency(self) -> "Commit":
        for alias, version in self.aliases.items():
            if version > self.version:
                raise ValueError(f"aliases.{alias}: must be at most the newest version, {self.version}, got {version}")
        for number in self.yanked:
            if int(number) > self.version:
                raise ValueError(f"yanked: must name versions up to the newest, {self.version}, got {number}")
        metrics = self.summary.get("metrics", {})
        if not isinstance(metrics, dict) or not all(isinstance(scores, dict) for scores in metrics.values()):
            raise ValueError("summary.metrics: must map each measurement to a mapping of scores")
        if self.schema_version == 1 and (self.yanked or self.op not in ("publish", "alias")):
            raise ValueError(
                f"an entry of schema 1 must be a publish or an alias, without yanked versions, got the op {self.op}"
            )
        if self.gate is not None and (self.schema_version < 3 or self.op != "alias"):
            raise ValueError(
                f"gate: must stand in an entry of the op alias and schema 3, got {self.op} and {self.schema_version}"
            )
        if self.op != "publish" and self.manifest_signature is not None:
            raise ValueError(f"manifest_signature: must stand in an entry of the op publish, got {self.op}")
        latest = self.aliases.get(LATEST)
        if latest is None:
            raise ValueError(f"aliases.{LATEST}: must be there, and is missing")
        if latest != (newest := newest_usable(self.version, self.yanked)):
            raise ValueError(f"aliases.{LATEST}: must be {newest}, got {latest}")
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
            RegistryError: a field is not valid in a log entry.
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
            raise RegistryError(f"cannot write this entry to the log: {first_problem(error)}") from None
        return commit.checked()

    @classmethod
    def parse(cls, raw: bytes, *, source: str) -> "Commit":
        """Read an entry from its bytes.

        Args:
            raw: the bytes.
            source: the key of the entry, for messages.

        Raises:
            IntegrityError: the bytes are not a valid entry, or not in canonical form.
            RegistryError: the entry has a newer schema than this program can read.
        """
        try:
            data = strict_json(raw, source=source, max_bytes=MAX_COMMIT_BYTES)
        except ManifestError as error:
            raise IntegrityError(str(error)) from None
        schema = data.get("schema_version") if isinstance(data, dict) else None
        if isinstance(schema, int) and schema > SCHEMA:
            raise RegistryError(
                f"{source}: `schema_version` must be at most {SCHEMA}, got {schema}. Upgrade finetune to read it."
            )
        checksum = data.pop(_CHECKSUM, None) if isinstance(data, dict) else None
        try:
            commit = cls.model_validate(data)
        except ValidationError as error:
            raise IntegrityError(f"{source}: not a valid log entry: {first_problem(error)}") from None
        # The next entry holds the digest of these bytes, so a commit must have exactly one form.
        if commit.to_bytes() != raw:
            damaged = "its checksum does not match its contents, so the entry was damaged"
            other = "not in the canonical form in which the registry writes entries"
            raise IntegrityError(f"{source}: {other if checksum == commit.checksum else damaged}")
        return commit

    def checked(self) -> "Commit":
        """Return the commit as it is read back; an entry that cannot be read would block the log for ever.

        Raises:
            RegistryError: a field is not valid in a log entry.
        """
        try:
            return Commit.parse(self.to_bytes(), source="the new entry")
        except ValueError as error:
            raise RegistryError(f"cannot write this entry to the log: {error}") from None

    def signed(self, key: SigningKey, namespace: str, name: str) -> "Commit":
        """Return the commit with its signature, and with that of the manifest where it publishes one.

        Args:
            key: the key that signs.
            namespace: the namespace of the adapter whose log the commit is for.
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
        """SHA-256 of all other fields, which reveals damage to the newest entry too; None before schema 3."""
        return sha256_hex(canonical_json(self._fields())) if self.schema_version >= 3 else None

    @property
    def current_summary(self) -> dict[str, Any]:
        """The summary with the keys of this release; entries of earlier releases have other keys."""
        return summary_from_schema_2(self.summary)

    def _fields(self) -> dict[str, Any]:
        # Without mode="json", which writes null for a number that is not finite.
        return self.model_dump(exclude={name for name, since in _SINCE.items() if self.schema_version < since})

    @property
    def digest(self) -> str:
        """SHA-256 of the bytes of the commit, which the next one holds as ``prev``."""
        return sha256_hex(self.to_bytes())


def newest_usable(version: int, yanked: Container[str]) -> int:
    """Return the version that ``latest`` points to: the newest version that is not yanked.

    When every version is yanked, that is the newest version, and a request for ``latest`` is an error.

    Args:
        version: the newest version.
        yanked: the numbers of the yanked versions, as texts.
    """
    return next((number for number in range(version, 0, -1) if str(number) not in yanked), version)
