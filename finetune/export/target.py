"""The interface of export targets: the source of an export, the target, and its comparisons."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, Protocol

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from torch import Tensor

    from finetune.adapters.folder import AdapterFolder
    from finetune.adapters.manifest import AdapterManifest
    from finetune.assemble.base import Base
    from finetune.core.batch import Batch, Placeholders
    from finetune.interfaces import Update

Verdict = Literal["passed", "inconclusive", "failed"]


@dataclass(frozen=True, kw_only=True)
class Source:
    """The adapter and base to export, with the outputs to compare.

    Attributes:
        ref: the name of the version: ``ns/name@17``, or ``ns/name@sha256:<digest>`` of an adapter's folder.
        adapter: the adapter's manifest and tensors, with every byte verified; on the base's device.
        base: the plain base in fp32, unquantized, with nothing attached; the target may change it.
        updates: full module name -> the update of the adapter for that module, as ``methods.adapter.merge``
            takes it.
        placeholders: the placeholders that rows must hold for the adapter's prompt; None if it has none.
        rows: name -> one row on the base's device, for the plain base; ``probe`` is the manifest's.
        plain: name -> the base's output for the row, fp32 on the CPU: logits [T, V], or embeddings [2, D].
        adapted: name -> the adapter's output for the row; a prompt of N tokens gives [N + T, V].
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
        """The version for a card: ``version 17``, or the beginning of its manifest's digest."""
        number = self.ref.rpartition("@")[2]
        return f"version {number}" if number.isdigit() else f"manifest {self.adapter.digest[:16]}"

    @property
    def manifest(self) -> AdapterManifest:
        """The adapter's manifest."""
        return self.adapter.manifest


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """One comparison of an export with the adapter or its tensors.

    Attributes:
        what: the text that names the two sides of the comparison.
        verdict: ``inconclusive`` if the base without the adapter would not fail either.
        largest_difference: the largest difference between two values.
        tolerance: the largest difference that passes.
        effect: the largest difference that the adapter itself makes; None if it was not measured.
    """

    what: str
    verdict: Verdict
    largest_difference: float
    tolerance: float
    effect: float | None = None


class Target(Protocol):
    """A program to which an adapter can be exported; a frozen dataclass, whose fields are the options."""

    def refuse(self, manifest: AdapterManifest) -> None:
        """Check that the target can hold an adapter.

        Raises:
            ExportError: the target cannot hold it; with the reason and another way.
        """

    def make(self, source: Source, folder: Path) -> list[Comparison]:
        """Write the files, read them back, and return the comparisons, at least that of the probe.

        Args:
            source: the adapter and base to export.
            folder: an empty folder; it becomes the output afterwards, unless a comparison failed.

        Raises:
            ExportError: the target cannot hold the adapter; with the reason.
        """
        ...
