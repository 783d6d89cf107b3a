"""The commit: one immutable entry in the log of an adapter, holding everything that was true after it.

Each entry holds the digest of the one before it, so that the newest vouches for all history. Each holds the
whole state (aliases, newest version and its summary), so that the newest alone answers most questions.
"""

import getpass
import re
import socket
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from finetune.adapters.manifest import Sha256, canonical_json, sha256_hex, strict_json
from finetune.adapters.reference import LATEST, AdapterRef, Alias, VersionNumber, check_name_part
from finetune.errors import AdapterReferenceError, IntegrityError, ManifestError, RegistryError

MAX_COMMIT_BYTES = 1024 * 1024

Txn = Annotated[str, Field(pattern=r"^[0-9a-f]{32}$")]

_LOG_KEY = re.compile(r"names/([^/]+)/([^/]+)/log/((?!0{12})[0-9]{12})\.json")


def log_key(namespace: str, name: str, seq: int) -> str:
    """Returns the key of the ``seq``-th entry of an adapter's log."""
    return f"names/{namespace}/{name}/log/{seq:012d}.json"


def split_log_key(key: str) -> tuple[str, str, int] | None:
    """Returns namespace, name and sequence number, or None when ``key`` is no entry of a log."""
    match = _LOG_KEY.fullmatch(key)
    if match is None:
        return None
    try:
        return check_name_part(match[1]), check_name_part(match[2]), int(match[3])
    except AdapterReferenceError:
        return None


def _first(error: ValidationError) -> str:
    first = error.errors()[0]
    return f"{'.'.join(str(part) for part in first['loc']) or 'top level'}: {first['msg']}"


def current_actor() -> str:
    """Returns ``user@host`` for the log: information, not proof."""
    try:
        user = getpass.getuser()
    except (OSError, KeyError):  # a container whose user has no entry in passwd
        user = "unknown"
    actor = f"{user}@{socket.gethostname()}"
    return "".join(c if c.isprintable() else "?" for c in actor)[:256]


class Commit(BaseModel):
    """One entry of a log. Frozen and strict: an unknown or missing field is an error."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    schema_version: Literal[1] = 1
    seq: VersionNumber  # place in the log, from 1, without gaps
    prev: Sha256 | None  # of the bytes of the entry before; None for the first
    txn: Txn  # chosen by the writer, who so knows its own entry again
    op: Literal["publish", "alias"]
    version: VersionNumber  # number of versions published so far, which is the newest version
    manifest: Sha256  # of the newest version
    # All of them, with the version that each stands for.
    aliases: dict[Alias, VersionNumber] = Field(max_length=1000)
    summary: dict[str, Any]  # of the newest version's manifest
    expect: dict[Alias, Annotated[int, Field(ge=0)]]  # what had to be true before; 0: no such alias
    actor: Annotated[str, Field(pattern=r"^[^\x00-\x1f\x7f]{1,256}$")]
    # Information only, for clocks differ; the order is that of seq.
    time: Annotated[str, Field(pattern=r"^\d{4}-\d\d-\d\dT\d\d:\d\d:\d\dZ$")]

    @model_validator(mode="after")
    def _aliases_stand_for_versions_that_exist(self) -> "Commit":
        if self.aliases.get(LATEST) is None:
            raise ValueError(f"the alias {LATEST} is missing")
        for alias, version in self.aliases.items():
            if version > self.version:
                raise ValueError(f"the alias {alias} stands for {version}, but {self.version} is the newest")
        return self

    @classmethod
    def after(cls, head: "Commit | None", **fields: Any) -> "Commit":
        """Returns the entry that follows ``head``, written here and now.

        Raises:
            RegistryError: what it should say does not fit into a log.
        """
        try:
            commit = cls(
                seq=1 if head is None else head.seq + 1,
                prev=None if head is None else head.digest,
                actor=current_actor(),
                time=datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ"),
                **fields,
            )
            # An entry that nobody can read would end the log for ever.
            return cls.parse(commit.to_bytes(), source="the new entry")
        except ValidationError as error:
            raise RegistryError(f"this cannot be written to the log: {_first(error)}") from None
        except ValueError as error:
            raise RegistryError(f"this cannot be written to the log: {error}") from None

    @classmethod
    def parse(cls, raw: bytes, *, source: str) -> "Commit":
        """Reads an entry from its bytes.

        Args:
            raw: the bytes.
            source: the key, for messages.

        Raises:
            IntegrityError: it is no entry, or not written as we write it.
            RegistryError: it has a newer schema than this program knows.
        """
        try:
            data = strict_json(raw, source=source, max_bytes=MAX_COMMIT_BYTES)
        except ManifestError as error:
            raise IntegrityError(str(error)) from None
        schema = data.get("schema_version") if isinstance(data, dict) else None
        if isinstance(schema, int) and schema > 1:
            raise RegistryError(f"{source}: written with schema {schema}, this program reads 1: upgrade finetune")
        try:
            commit = cls.model_validate(data)
        except ValidationError as error:
            raise IntegrityError(f"{source}: not a commit: {_first(error)}") from None
        # The digest in the next entry is of these bytes; only one spelling may stand for one commit.
        if commit.to_bytes() != raw:
            raise IntegrityError(f"{source}: not in the canonical form in which commits are written")
        return commit

    def to_bytes(self) -> bytes:
        """Returns the canonical JSON of the commit."""
        # Not mode="json", which writes null for a number that is not finite.
        return canonical_json(self.model_dump())

    @property
    def digest(self) -> str:
        """SHA-256 of the bytes of the commit, which the next one holds as ``prev``."""
        return sha256_hex(self.to_bytes())


def check_link(commit: Commit, previous: Commit | None) -> list[str]:
    """Returns what is wrong between an entry and the one before it; nothing when they belong together.

    Args:
        commit: the entry.
        previous: the entry before it, None for the first.
    """
    problems = []
    if commit.seq != (1 if previous is None else previous.seq + 1):
        problems.append(f"it says that it is entry {commit.seq}")
    if commit.prev != (None if previous is None else previous.digest):
        problems.append(
            "its prev is not the digest of the entry before it, so one of the two was changed"
            if previous
            else "it is the first entry, but names one before it"
        )
    published = 0 if previous is None else previous.version
    if commit.op == "publish":
        if commit.version != published + 1:
            problems.append(f"it publishes version {commit.version} after version {published}")
        if commit.aliases[LATEST] != commit.version:
            problems.append(f"it publishes {commit.version}, but {LATEST} stands for {commit.aliases[LATEST]}")
    elif previous is None:
        problems.append("it moves an alias before anything was published")
    elif any(getattr(commit, name) != getattr(previous, name) for name in ("version", "manifest", "summary")):
        problems.append("it moves an alias, but its newest version differs from that of the entry before it")
    return problems


@dataclass(frozen=True, kw_only=True)
class Version:
    """One published version of an adapter.

    Attributes:
        namespace: the team or domain.
        name: the adapter.
        version: its number, counted from 1 without gaps.
        digest: SHA-256 of its manifest.
        aliases: the words that stand for it now, sorted.
        summary: what the log keeps of its manifest.
        time: when it was published, by the clock of whoever did.
        actor: who published it, by their own word.
        seq: the entry of the log that published it.
    """

    namespace: str
    name: str
    version: int
    digest: str
    aliases: tuple[str, ...]
    summary: dict[str, Any]
    time: str
    actor: str
    seq: int

    @classmethod
    def of(cls, ref: AdapterRef, commit: Commit, aliases: dict[str, int]) -> "Version":
        """Returns the version that ``commit`` published, with those of ``aliases`` that stand for it."""
        return cls(
            namespace=ref.namespace,
            name=ref.name,
            version=commit.version,
            digest=commit.manifest,
            aliases=tuple(sorted(alias for alias, version in aliases.items() if version == commit.version)),
            summary=commit.summary,
            time=commit.time,
            actor=commit.actor,
            seq=commit.seq,
        )

    @property
    def full_name(self) -> str:
        """``namespace/name``."""
        return f"{self.namespace}/{self.name}"

    @property
    def ref(self) -> str:
        """``namespace/name@17``."""
        return f"{self.full_name}@{self.version}"
