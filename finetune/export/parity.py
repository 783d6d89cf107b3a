"""Comparisons of an export with the adapter: outputs on the probe and a few other rows, and tensors."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from finetune.adapters.probe import probe_conversation
from finetune.core.example import answer, ask
from finetune.export.target import Comparison

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from torch import Tensor

    from finetune.adapters.manifest import Probe
    from finetune.assemble.base import Base
    from finetune.core.batch import Batch, Placeholders
    from finetune.export.target import Verdict

# The tolerance for the rounding of weights, as a part of the largest output; the error adds up over the layers.
ROUNDING = {"float32": 1e-4, "float16": 5e-3, "bfloat16": 4e-2}
_TEXTS = (
    ("Describe it.", "a small image with many squares of different colors"),
    ("How many are there, and which is the largest?", "four; the largest is the one on the right"),
)


def rows_of(base: Base, probe: Probe) -> dict[str, Batch]:
    """Return the rows for comparisons of outputs: the probe's, and some with other images and texts."""
    rows = {"probe": base.probe_batch(probe.seed)}
    for number, (question, text) in enumerate(_TEXTS, start=1):
        _, image = probe_conversation(probe.seed + number)
        rows[f"text {number}"] = base.one_row([*ask(question), answer(text)], image)
    return rows


def outputs(base: Base, rows: Mapping[str, Batch], placeholders: Placeholders | None = None) -> dict[str, Tensor]:
    """Return the outputs of a model for each row, fp32 on the CPU.

    Args:
        base: the model in its present state.
        rows: name -> one row.
        placeholders: the placeholders of the active adapter; None if it has none.
    """
    found = {}
    with torch.inference_mode():
        for name, row in rows.items():
            inputs = (placeholders.insert(row) if placeholders else row).inputs
            found[name] = base.family.outputs(base.model, inputs)[0].float().cpu()
    return found


def compare(
    what: str,
    got: Mapping[str, Tensor],
    *,
    wanted: Mapping[str, Tensor],
    plain: Mapping[str, Tensor],
    rounding: float = ROUNDING["float32"],
) -> Comparison:
    """Compare outputs of an export with those of the adapter.

    Args:
        what: the text that names the two sides of the comparison.
        got: name of a row -> outputs of the export. If the lengths differ, as with a prompt before one row, the last
            positions are compared.
        wanted: name of a row -> outputs of the adapter.
        plain: name of a row -> outputs of the base alone.
        rounding: the tolerance, as a part of the largest output.

    Returns:
        The comparison. It is ``failed`` if a difference is above the tolerance, or is not a number. It is
        ``inconclusive`` if the adapter's own effect is not above the precision of fp32, or not above twice the largest
        difference. So the base alone never passes.
    """
    off = max((_largest(got[name], wanted[name]) for name in got), key=_worst)
    effect = max(_largest(plain[name], wanted[name]) for name in got)
    largest = max(plain[name].abs().max().item() for name in got)
    tolerance, shown = rounding * largest, ROUNDING["float32"] * largest
    verdict: Verdict = "passed" if effect > max(shown, 2 * off) else "inconclusive"
    if not off <= tolerance:
        verdict = "failed"
    return Comparison(what=what, verdict=verdict, largest_difference=off, tolerance=tolerance, effect=effect)


def compare_tensors(what: str, pairs: Iterable[tuple[Tensor, Tensor]]) -> Comparison:
    """Compare tensors that were read back with the originals: ``passed`` if they are equal."""
    off = 0.0
    for got, wanted in pairs:
        if got.shape != wanted.shape or got.dtype != wanted.dtype:
            off = float("inf")
        elif not torch.equal(got, wanted):
            off = max(off, _largest(got, wanted), key=_worst)
    return Comparison(what=what, verdict="failed" if off else "passed", largest_difference=off, tolerance=0.0)


def _largest(got: Tensor, wanted: Tensor) -> float:
    """Return the largest difference in the positions that both have, counted from the last."""
    positions = min(len(got), len(wanted)) if got.ndim else 0
    got, wanted = (t[-positions:].float() if positions else t.float() for t in (got, wanted))
    return (got - wanted).abs().max().item()


def _worst(off: float) -> float:
    return float("inf") if off != off else off  # NaN is not comparable
