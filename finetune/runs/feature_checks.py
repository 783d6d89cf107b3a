"""The check that rows with stored features give the same inputs and logits as with images."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor

    from finetune.assemble.base import Base
    from finetune.core.batch import Batch
    from finetune.core.example import Example
    from finetune.data.collate import Collator, FeatureLookup

# The largest difference of logits, as a share of the largest one. A convolution may round differently for a batch than
# for one image.
_TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 0.05}


def why_not_exact(base: Base, collator: Collator, rows: Sequence[Example], features: FeatureLookup) -> str | None:
    """Return how a few rows with features differ in inputs or logits from those with images; None if they agree.

    The logits are those of the first row, with images alone, and with features together with the other rows.

    Args:
        base: the plain base, whose frozen modules replay stored outputs.
        collator: the collator that opens images.
        rows: the rows, as one training batch.
        features: the features of these rows.
    """
    device, dtype = base.model.device, base.model.dtype
    supervised = [(row, True) for row in rows]
    plain = collator.training_batch(supervised).to(device, dtype)
    stored = collator.reading(features).training_batch(supervised).to(device, dtype)
    for name, value in plain.inputs.items():
        other = stored.inputs.get(name)
        if not name.startswith("pixel_") and not (isinstance(other, torch.Tensor) and torch.equal(value, other)):
            return f"the processor of {base.identity.model_type} makes a different {name} without pixels"
    alone = collator.training_batch(supervised[:1]).to(device, dtype)  # a tower may take as long as all else together
    with torch.inference_mode():
        wanted, got = (_first_logits(base, batch) for batch in (alone, stored))
    difference, largest = float((wanted - got).abs().max()), float(wanted.abs().max())
    if difference > _TOLERANCE.get(dtype, 0.0) * largest:
        return f"the logits of row {rows[0].id} would differ by {difference:.2g} (the largest is {largest:.2g})"
    return None


def _first_logits(base: Base, batch: Batch) -> Tensor:
    """Return the fp32 logits [T, V] of the first row."""
    mask = batch.inputs["attention_mask"][0].bool()  # [T]
    return base.family.outputs(base.model, batch.inputs)[0][mask].float()
