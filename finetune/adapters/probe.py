"""The probe: a check that an adapter still has, on this base, the effect that it had when it was saved.

A synthetic image and text, made from a seed, go through the base and through the adapted model. The check compares the
effect, the difference between the two outputs: a wrong base, or half an adapter, gives another effect.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import numpy as np
import torch
from PIL import Image

from finetune.adapters.manifest import Probe
from finetune.core.example import answer, ask
from finetune.errors import ProbeError

if TYPE_CHECKING:
    from torch import Tensor

    from finetune.core.example import Message
    from finetune.recipe import Quantization

VERSION = 1
_POSITIONS, _COLUMNS = 4, 64
_TOLERANCE = {torch.float32: 0.02, torch.bfloat16: 0.2, torch.float16: 0.2}
_OTHER_QUANTIZATION = 0.5  # tolerance between two different quantizations of the base
# Largest effect, relative to the outputs, that rounding alone may cause.
_NOISE = {torch.float32: 1e-5, torch.bfloat16: 2e-2, torch.float16: 2e-3}


@dataclass(frozen=True)
class ProbeResult:
    """The result of replaying a probe."""

    verdict: Literal["passed", "inconclusive"]
    difference: float  # of the live effect from the recorded one, relative to the recorded


def probe_conversation(seed: int) -> tuple[list[Message], Image.Image]:
    """Return the synthetic conversation and its image. Raise ``VERSION`` when you change either."""
    rng = np.random.default_rng([VERSION, seed])
    coarse = rng.integers(0, 256, (6, 6, 3), dtype=np.uint8)
    image = Image.fromarray(np.kron(coarse, np.ones((32, 32, 1), np.uint8)))
    return [*ask("What does this picture show, and where?"), answer("one red circle, left")], image


def probe_values(outputs: Tensor, *, seed: int, width: int | None = None) -> Tensor:
    """Return the recorded part of a model's outputs: fp32 [4, 64], or [2, 64] for embeddings of image and text.

    Args:
        outputs: the outputs for the row of ``probe_conversation``: logits [T, V], or embeddings [2, D].
        seed: the seed of the conversation, which also chooses the columns of the vocabulary or the embedding.
        width: the width of the base's own outputs; a task's head has fewer outputs, which are repeated to this width.
    """
    rng = np.random.default_rng([VERSION, seed, 1])
    width = width or outputs.shape[-1]
    columns = torch.from_numpy(np.sort(rng.choice(width, min(_COLUMNS, width), replace=False)))
    return outputs[-_POSITIONS:].float().cpu()[:, columns % outputs.shape[-1]]


def record(
    base: Tensor, adapted: Tensor, *, seed: int, dtype: torch.dtype, quantization: Quantization | None = None
) -> Probe:
    """Return the probe for the manifest; ``dtype`` is the dtype in which the model computed."""
    return Probe(
        version=VERSION,
        seed=seed,
        dtype=str(dtype).removeprefix("torch."),  # type: ignore[arg-type]
        quantization=quantization,
        base=base.tolist(),
        adapter=adapted.tolist(),
    )


def compare(
    probe: Probe,
    base: Tensor,
    adapted: Tensor,
    *,
    dtype: torch.dtype,
    quantization: Quantization | None = None,
    has_head: bool = False,
) -> ProbeResult:
    """Compare the live effect of an adapter with the recorded one.

    Args:
        probe: the recorded probe.
        base: the live values with the adapter off, in the shape of the recorded values.
        adapted: the live values with the adapter on.
        dtype: the dtype in which the live model computes.
        quantization: the quantization of the live model.
        has_head: True if a head of the task gave the adapter's values. They are then compared directly, not as a
            change of the base's values.

    Returns:
        ``passed``, or ``inconclusive`` if the recorded effect is below the noise of ``dtype``; and the difference.

    Raises:
        ProbeError: the effect differs by more than rounding explains, or the probe does not fit this model.
    """
    if probe.version != VERSION:
        raise ProbeError(
            f"the probe of the adapter must have version {VERSION}, got {probe.version}. Load it with the release that "
            "saved it, or train it again."
        )
    # In fp64, since squares of fp32 outputs may overflow fp32.
    saved_base, saved_adapter = (torch.tensor(values, dtype=torch.float64) for values in (probe.base, probe.adapter))
    if saved_base.shape != base.shape or saved_adapter.shape != base.shape:
        raise ProbeError(
            f"the recorded probe must have the shape {list(base.shape)} of this model's outputs, got "
            f"{list(saved_base.shape)}. Load the base that the adapter was trained on."
        )
    if has_head:
        saved, live, base = saved_adapter, adapted, adapted
    else:
        saved, live = saved_adapter - saved_base, adapted - base
    size, off = saved.norm().item(), (live - saved).norm().item()
    coarser = max(dtype, getattr(torch, probe.dtype), key=_TOLERANCE.__getitem__)
    other_weights = quantization != probe.quantization
    tolerance = _OTHER_QUANTIZATION if other_weights else _TOLERANCE[coarser]
    # From the live outputs: a manifest could record outputs so large that any effect counts as noise.
    noise = max(_NOISE[coarser], _NOISE[torch.bfloat16] if other_weights else 0) * base.norm().item()
    if not (math.isfinite(off) and off <= max(tolerance * size, noise)):
        raise ProbeError(
            "the adapter must have the effect that it had when it was saved: its effect on the probe is "
            f"{live.norm().item():.4g}, the recorded effect is {size:.4g}, and they differ by {off:.4g} (rounding "
            f"explains at most {tolerance:.0%} of the recorded effect). {_advice(probe.quantization, quantization)}"
        )
    return ProbeResult("passed" if size > noise else "inconclusive", off / size if size else 0.0)


def _advice(saved: Quantization | None, live: Quantization | None) -> str:
    """Return the advice on loading an adapter with the base and quantization of its training."""
    if saved == live:
        return "Check the base, and the versions of torch and transformers in the manifest."
    how = "with no --quantization" if saved is None else f"with --quantization {saved} (quantization={saved!r})"
    return (
        f"It was trained on a base held in {saved or 'full precision'}, and this base is held in "
        f"{live or 'full precision'}: load the base {how}."
    )
