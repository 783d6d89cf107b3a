"""The record and verdict of an export, which are written beside its files as ``export.json``."""

from __future__ import annotations

import hashlib
import json
import platform
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path

    from finetune.export.target import Comparison, Source, Verdict

VERDICT_NAME = "export.json"
_PACKAGES = ("finetune-vlm", "torch", "transformers", "peft", "safetensors", "onnx", "onnxruntime", "gguf")


@dataclass(frozen=True, kw_only=True)
class Export:
    """A finished export.

    Attributes:
        folder: the folder of its files.
        verdict: ``passed``; ``inconclusive`` if the adapter's effect on the compared rows is below the rounding error,
            so that only equal tensors confirm the export.
        record: the contents of ``export.json``.
    """

    folder: Path
    verdict: Verdict
    record: Mapping[str, Any]


def overall(comparisons: Sequence[Comparison]) -> Verdict:
    """Return the verdict on an export: ``failed`` if any comparison failed, or if none passed."""
    verdicts = {comparison.verdict for comparison in comparisons}
    if "failed" in verdicts or "passed" not in verdicts:
        return "failed"
    return "inconclusive" if "inconclusive" in verdicts else "passed"


def record_of(
    source: Source,
    folder: Path,
    comparisons: Sequence[Comparison],
    *,
    target: str,
    options: Mapping[str, Any],
) -> dict[str, Any]:
    """Return the contents of ``export.json``, with the digests of all files in ``folder``.

    Args:
        source: the adapter and base that were exported.
        folder: the folder of the files.
        comparisons: the comparisons that the target returned.
        target: the name of the target.
        options: all options of the target, with their values.
    """
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return {
        "schema_version": 1,
        "ref": source.ref,
        "manifest": source.adapter.digest,
        "base": source.manifest.base.model_dump(),
        "target": target,
        "options": dict(options),
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "verdict": overall(comparisons),
        "comparisons": [asdict(comparison) for comparison in comparisons],
        "files": {path.relative_to(folder).as_posix(): _entry(path) for path in files},
        "toolchain": {"python": platform.python_version(), **_versions()},
    }


def write_record(folder: Path, record: Mapping[str, Any]) -> None:
    """Write ``export.json``."""
    (folder / VERDICT_NAME).write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")


def describe(comparison: Comparison) -> str:
    """Return a comparison as one line of text."""
    effect = "" if comparison.effect is None else f"; the adapter's own effect is {comparison.effect:.3g}"
    return (
        f"{comparison.verdict}: {comparison.what}: largest difference {comparison.largest_difference:.3g}, at most "
        f"{comparison.tolerance:.3g} allowed{effect}"
    )


def _entry(path: Path) -> dict[str, Any]:
    with path.open("rb") as file:
        return {"sha256": hashlib.file_digest(file, "sha256").hexdigest(), "size": path.stat().st_size}


def _versions() -> dict[str, str]:
    found = {}
    for name in _PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:  # of an extra
            continue
    return found
