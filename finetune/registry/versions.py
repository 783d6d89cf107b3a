"""One published version, as it is answered to whoever asks."""

from dataclasses import dataclass, field
from typing import Any

from finetune.adapters.reference import AdapterRef
from finetune.registry.commits import Commit


@dataclass(frozen=True, kw_only=True)
class Version:
    """One published version of an adapter.

    Attributes:
        namespace: the team or domain.
        name: the adapter.
        version: its number, counted from 1 without gaps.
        digest: SHA-256 of its manifest.
        aliases: the words that stand for it now, sorted.
        yanked: why it is not to be used any more; None when it may be.
        summary: what the log keeps of its manifest, under today's names.
        time: when it was published, by the clock of whoever did.
        actor: who published it, by their own word.
        seq: the entry of the log that published it.
        signature: over ``digest``, as it stands in the log; None when it was published unsigned.
        note: of what ``publish`` returned: which earlier version has the same bytes or weights; None where none has.
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
        """Return the version that ``commit`` published, with what ``head`` says of it."""
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
        """What whoever asked for exactly this version has to be told; None when there is nothing."""
        return None if self.yanked is None else f"{self.ref} is yanked: {self.yanked}. Use another version."
