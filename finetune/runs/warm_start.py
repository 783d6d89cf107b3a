"""A start from the weights of a finished adapter instead of fresh ones: the same base, the same methods and shapes."""

from __future__ import annotations

from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from finetune.adapters.base_identity import require_same_base, require_same_processor
from finetune.adapters.folder import read_folder, verify
from finetune.adapters.probe import compare
from finetune.adapters.reference import as_folder
from finetune.errors import FinetuneError, TrainingError
from finetune.methods.adapter import switch
from finetune.recipe.differing import describe as describe_differences
from finetune.recipe.differing import differing
from finetune.runs.saving import describe

if TYPE_CHECKING:
    from collections.abc import Iterator

    from finetune.adapters.folder import AdapterFolder
    from finetune.adapters.manifest import AdapterDescription
    from finetune.assemble.base import Base
    from finetune.interfaces import Attachment
    from finetune.registry import AdapterRegistry

KEY = "adapter.init_from"


@dataclass(frozen=True, kw_only=True)
class Parent:
    """The finished adapter that a run starts from.

    Attributes:
        asked: the reference or folder, as in the recipe.
        folder: the adapter that was read and verified.
    """

    asked: str
    folder: AdapterFolder

    @classmethod
    def read(cls, asked: str, registry: AdapterRegistry) -> Parent:
        """Read and verify an adapter, before a base is loaded.

        Raises:
            TrainingError: there is no such adapter, or its files have changed.
        """
        with _named(asked):
            path = as_folder(asked)
            if path is not None:
                return cls(asked=asked, folder=read_folder(path))
            version = registry.resolve(asked)
            manifest, read = registry.read(version)
            return cls(asked=asked, folder=verify(manifest, read, digest=version.digest, source=Path(version.ref)))

    @property
    def ref(self) -> str:
        """The reference by digest, which the new adapter's manifest keeps."""
        return f"{self.folder.manifest.full_name}@sha256:{self.folder.digest}"

    def require_base(self, base: Base) -> None:
        """Check that the adapter belongs to ``base``.

        Raises:
            TrainingError: the adapter belongs to another base.
        """
        with _named(self.asked):
            require_same_base(self.folder.manifest.base, base.identity)
            require_same_processor(self.folder.manifest.processor, base.digests)

    @torch.no_grad()
    def write_into(self, attachment: Attachment, base: Base) -> None:
        """Give a fresh adapter the parent's weights, and check its effect; every process has to call it.

        Raises:
            TrainingError: the two differ in methods or shapes, or the effect differs from the recorded one.
        """
        manifest = self.folder.manifest
        here, there = describe(attachment, base.identity.model_type), manifest.adapter
        if different := differing(_parts(there), _parts(here)) or differing(_table(there), _table(here)):
            raise TrainingError(
                f"{KEY}: the adapter must have this recipe's method, but {self.asked} differs: "
                f"{describe_differences(different, 4)}. Give the recipe the adapter's method, or name another adapter."
            )
        for name, parameter in attachment.parameters.items():
            parameter.copy_(self.folder.tensors[name])
        base.model.eval()
        probe = manifest.probe
        switch(base.model, on=False)
        off = base.probe(probe.seed)
        switch(base.model, on=True)
        on = base.probe(probe.seed, attachment.placeholders)
        with _named(self.asked):
            compare(
                probe,
                off,
                on,
                dtype=base.model.dtype,
                quantization=base.quantization,
                has_head=manifest.adapter.has_head,
            )


def _parts(adapter: AdapterDescription) -> dict[str, Any]:
    parts = {part.method: part.model_dump() for part in adapter.parts}
    for part in parts.values():
        part["options"].pop("lora_dropout", None)  # a setting of the training, not of the adapter
    return parts


def _table(adapter: AdapterDescription) -> dict[str, Any]:
    return {name: entry.model_dump() for name, entry in adapter.tensors.items()}


@contextmanager
def _named(asked: str) -> Iterator[None]:
    """Name the key of the recipe in errors inside the block."""
    try:
        yield
    except FinetuneError as error:
        raise TrainingError(f"{KEY}: {asked}: {error}") from error
