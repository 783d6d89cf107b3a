"""How the room and its targets meet: what is exported, what a target does, what it found."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, Protocol

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from torch import Tensor

    from finetune.adapters.folder import AdapterFolder
    from finetune.adapters.manifest import AdapterManifest
    from finetune.batch import Batch, Placeholders
    from finetune.build import Base
    from finetune.interfaces import Update

Verdict = Literal["passed", "inconclusive", "failed"]


@dataclass(frozen=True, kw_only=True)
class Source:
    """What is exported.

    Attributes:
        ref: names the version: ``ns/name@17``, or ``ns/name@sha256:<digest>`` of an adapter's folder.
        adapter: its manifest and tensors, every byte checked; on the base's device.
        base: the plain base in fp32, unquantized, with nothing attached; the target may change it or use it up.
        updates: full module name -> what the adapter computes in the place of that module, as ``methods.adapter.merge``
            takes it.
        placeholders: what rows must hold for the adapter's prompt; None where it has none.
        rows: name -> one row on the base's device, as the plain base takes it; ``probe`` is the manifest's.
        plain: name -> what the base makes of the row, fp32 on the CPU: logits [T, V], or embeddings [2, D].
        adapted: name -> what the adapter makes of it; a prompt of N tokens gives [N + T, V].
    """

    ref: str
    adapter: AdapterFolder
    base: Base
    updates: Mapping[str, Update]
    placeholders: Placeholders | None
    rows: Mapping[str, Batch]
    plain: Mapping[str, Tensor]
    adapted: Mapping[str, Tensor]

    @property
    def version(self) -> str:
        """How a card calls the version: ``version 17``, or the beginning of its manifest's digest."""
        number = self.ref.rpartition("@")[2]
        return f"version {number}" if number.isdigit() else f"manifest {self.adapter.digest[:16]}"

    @property
    def manifest(self) -> AdapterManifest:
        """The adapter's."""
        return self.adapter.manifest


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """One thing that was held against what it should be.

    Attributes:
        what: what was compared with what.
        verdict: ``inconclusive`` where the base without the adapter would not have failed either.
        largest_difference: between two values.
        tolerance: the most that it may be.
        effect: the largest difference that the adapter itself makes; None where nothing like that was measured.
    """

    what: str
    verdict: Verdict
    largest_difference: float
    tolerance: float
    effect: float | None = None


class Target(Protocol):
    """A place where an adapter can go; a frozen dataclass, whose fields are the options."""

    def refuse(self, manifest: AdapterManifest) -> None:
        """Raise ExportError, with the reason and what else can be done, where such an adapter cannot go there."""

    def make(self, source: Source, folder: Path) -> list[Comparison]:
        """Write the files, reads them back, and return what was compared: the probe, at the least.

        Args:
            source: what is exported.
            folder: exists and is empty; what is in it afterwards is delivered, unless a comparison failed.

        Raises:
            ExportError: it cannot be written there, with the reason.
        """
        ...
