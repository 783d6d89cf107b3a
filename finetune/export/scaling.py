"""LoRA with its scaling baked into its weights, for engines that read the scaling differently or not at all."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

from torch.nn.functional import pad

if TYPE_CHECKING:
    from collections.abc import Mapping

    from torch import Tensor

_PREFIX = "base_model.model."  # of every tensor name in a PEFT folder


def bake_scaling(tensors: Mapping[str, Tensor], config: Mapping[str, Any]) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Return the same LoRA with ``lora_alpha == r`` for every module: no rslora, no patterns.

    B is multiplied by the scaling. Modules of a smaller rank are padded with zeros to the largest rank, because some
    engines read one rank only; their outputs do not change. Those of a DoRA do not change either: it uses only the
    scaled product and its own magnitude.

    Args:
        tensors: the tensors under PEFT's names: A [r, I], B [O, r], and the magnitudes of a DoRA [O].
        config: PEFT's config, with full module names in its patterns.

    Returns:
        The tensors, A and B in fp32, and the config.
    """
    ranks = {
        name.removeprefix(_PREFIX).removesuffix(".lora_A.weight"): len(tensor)
        for name, tensor in tensors.items()
        if name.endswith(".lora_A.weight")
    }
    widest = max(ranks.values())
    baked = dict(tensors)
    for module, r in ranks.items():
        alpha = config["alpha_pattern"].get(module, config["lora_alpha"])
        scaling = alpha / math.sqrt(r) if config["use_rslora"] else alpha / r
        down, up = (f"{_PREFIX}{module}.lora_{kind}.weight" for kind in "AB")
        baked[down] = pad(tensors[down].float(), (0, 0, 0, widest - r))  # [R, I]
        baked[up] = pad(tensors[up].float() * scaling, (0, widest - r)).contiguous()  # [O, R]
    same = {"r": widest, "lora_alpha": widest, "use_rslora": False, "rank_pattern": {}, "alpha_pattern": {}}
    return baked, {**config, **same}
