"""The catalog of the page: each adapter with its scores, and the reason if the loaded base cannot use it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from finetune.adapters.reference import as_folder
from finetune.metrics.names import COUNTS, TEST, named_values
from finetune.registry.trust.signing import manifest_message

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from finetune.adapters.manifest import BaseIdentity
    from finetune.errors import FinetuneError
    from finetune.registry import AdapterRegistry, Version
    from finetune.registry.trust.policy import Verdict


@dataclass(frozen=True, kw_only=True)
class CatalogEntry:
    """One adapter as the page shows it.

    Attributes:
        ref: the reference to load: an exact version, or a folder.
        name: its unique name on the page.
        version: the number of the version; None for a folder, or if the adapter cannot be read.
        aliases: the aliases of this version.
        summary: the summary of its manifest; see ``AdapterManifest.summary``. Empty if it cannot be read.
        signature: a text about its signer.
        refusal: the reason why it cannot be chosen; None if it can.
    """

    ref: str
    name: str
    version: int | None
    aliases: tuple[str, ...]
    summary: dict[str, Any]
    signature: str
    refusal: str | None

    @property
    def synthetic(self) -> bool:
        """True if it was trained on images drawn by a program."""
        return bool(self.summary.get("synthetic"))

    @property
    def values(self) -> dict[str, float]:
        """Name -> value of each metric on its test split; see ``finetune.metrics.names``. Empty if it has none."""
        return named_values(self.summary.get("metrics"))

    @property
    def metrics(self) -> list[str]:
        """The metrics by which it was evaluated."""
        names = [name.removeprefix(f"{TEST}.") for name in self.values if name.startswith(f"{TEST}.")]
        return [name for name in names if "." not in name and name not in COUNTS]


def read_catalog(registry: AdapterRegistry, refs: Sequence[str], base: BaseIdentity) -> list[CatalogEntry]:
    """Return the catalog entries, with the reason where one cannot be chosen; nothing is loaded.

    Args:
        registry: the registry in which names are looked up.
        refs: references and adapter folders; empty for the latest version of every adapter, with the unreadable
            adapters last. ``base`` has no entry.
        base: the identity of the loaded base.

    Raises:
        FinetuneError: a reference does not exist, or the registry or its trust policy cannot be read.
    """
    if not refs:
        unreadable: list[CatalogEntry] = []
        versions = registry.list(onerror=lambda name, error: unreadable.append(_unreadable(name, error)))
        return [*(_of_version(registry, version, version.full_name, base) for version in versions), *unreadable]
    entries = []
    for ref in dict.fromkeys(refs):
        if ref == "base":  # the page always shows it
            continue
        folder = as_folder(ref)
        if folder is None:
            entries.append(_of_version(registry, registry.resolve(ref), ref, base))
        else:
            entries.append(_of_folder(registry, folder, ref, base))
    return entries


def _unreadable(name: str, error: FinetuneError) -> CatalogEntry:
    return CatalogEntry(
        ref=name, name=name, version=None, aliases=(), summary={}, signature="", refusal=f"cannot be read: {error}"
    )


def _of_version(registry: AdapterRegistry, version: Version, name: str, base: BaseIdentity) -> CatalogEntry:
    verdict = registry.guard.policy.verify_signature(
        version.namespace, version.signature, manifest_message(version.digest)
    )
    demand = registry.guard.policy.of(version.namespace).signatures
    refusal = f"yanked: {version.yanked}" if version.yanked is not None else _refusal(version.summary, base)
    return CatalogEntry(
        ref=version.ref,
        name=name,
        version=version.version,
        aliases=version.aliases,
        summary=version.summary,
        signature=_signature(demand, verdict, is_signed=version.signature is not None),
        refusal=refusal or _untrusted(demand, verdict),
    )


def _of_folder(registry: AdapterRegistry, folder: Path, name: str, base: BaseIdentity) -> CatalogEntry:
    manifest, verdict = registry.guard.verify_folder(folder)
    demand = registry.guard.policy.of(manifest.namespace).signatures
    summary = manifest.summary()
    return CatalogEntry(
        ref=str(folder.absolute()),  # "./medical/mri" would be a reference without its "./"
        name=name,
        version=None,
        aliases=(),
        summary=summary,
        signature=_signature(demand, verdict, is_signed=(folder / "manifest.sig").exists()),
        refusal=_refusal(summary, base) or _untrusted(demand, verdict),
    )


def _refusal(summary: dict[str, Any], base: BaseIdentity) -> str | None:
    wanted = summary.get("base")
    if wanted == base.digest:
        return None
    known_as = summary.get("base_id")
    return f"trained on another base: {f'{known_as}, ' if known_as else ''}identity {str(wanted)[:12]}"


def _untrusted(demand: str, verdict: Verdict) -> str | None:
    return (
        f"the trust policy does not accept it: {verdict.problem}" if demand == "require" and verdict.problem else None
    )


def _signature(demand: str, verdict: Verdict, *, is_signed: bool) -> str:
    if demand == "off":
        return "signed, not checked" if is_signed else "not signed"
    if verdict.problem is None:
        return f"signed by {verdict.signer}"
    return verdict.problem.removeprefix("it is ")
