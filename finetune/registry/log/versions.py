"""The published version of an adapter, as the registry returns it."""

from dataclasses import dataclass, field
from typing import Any

from finetune.adapters.reference import AdapterRef
from finetune.registry.log.commits import Commit


@dataclass(frozen=True, kw_only=True)
class Version:
    """One published version of an adapter.

    Attributes:
        namespace: the team or domain.
        name: the adapter.
        version: the number of the version, counted from 1 without gaps.
        digest: the SHA-256 of its manifest.
        aliases: the aliases that point to it now, sorted.
        yanked: the reason why the version is yanked; None when it is not.
        summary: the summary of its manifest in the log, with the keys of this release.
        time: the time of the publish, by the clock of the writer.
        actor: the name that the writer gave; nothing proves it.
        seq: the number of the log entry that published it.
        signature: the signature over ``digest`` in the log; None when the version was published unsigned.
        note: a note from ``publish`` when an earlier version has the same bytes or weights; else None.
    """

    namespace: str
    name: str
    version: int
    digest: str
    aliases: tuple[str, ...]
    yanked: str | None
    summary: dict[str, Any]
    time: str
    actor: str
    seq: int
    signature: str | None
    note: str | None = field(default=None, compare=False)

    @classmethod
    def of(cls, ref: AdapterRef, commit: Commit, head: Commit) -> "Version":
        """Return the version that ``commit`` published, with its aliases and yank from ``head``."""
        return cls(
            namespace=ref.namespace,
            name=ref.name,
            version=commit.version,
            digest=commit.manifest,
            aliases=tuple(sorted(alias for alias, version in head.aliases.items() if version == commit.version)),
            yanked=head.yanked.get(str(commit.version)),
            summary=commit.current_summary,
            time=commit.time,
            actor=commit.actor,
            seq=commit.seq,
            signature=commit.manifest_signature,
        )

    @property
    def full_name(self) -> str:
        """``namespace/name``."""
        return f"{self.namespace}/{self.name}"

    @property
    def ref(self) -> str:
        """``namespace/name@17``."""
        return f"{self.full_name}@{self.version}"

    @property
    def warning(self) -> str | None:
        """The warning for a user of this version; None when it is not yanked."""
        return None if self.yanked is None else f"{self.ref} is yanked: {self.yanked}. Use another version."
