"""The allowed options of a finished LoRA adapter. Loads no PEFT, so that any engine's environment can ask."""

from collections.abc import Mapping
from typing import Any

from finetune.errors import ManifestError, brief
from finetune.tables import LORA_OPTIONS


def check_options(options: Mapping[str, Any], modules: list[str]) -> None:
    """Raise ManifestError unless ``options`` are those of our LoRA, with values PEFT takes literally."""
    if set(options) != LORA_OPTIONS:
        raise ManifestError(
            f"the options of a LoRA adapter are {', '.join(sorted(LORA_OPTIONS))}, not {brief([*options], 200)}"
        )
    if type(options["r"]) is not int or not 1 <= options["r"] <= 4096:
        raise ManifestError(f"rank {brief(options['r'])} is not a number between 1 and 4096")
    ranks, alphas = options["rank_pattern"], options["alpha_pattern"]
    for name, pattern in (("rank_pattern", ranks), ("alpha_pattern", alphas)):
        if not isinstance(pattern, dict) or not set(pattern) <= set(modules):
            raise ManifestError(f"{name} must map names of the adapter's modules, not {brief(pattern)}")
    for name, rank in ranks.items():
        if type(rank) is not int or not 1 <= rank <= 4096:
            raise ManifestError(f"rank {brief(rank)} of {name!r} is not a number between 1 and 4096")
    for alpha in (options["lora_alpha"], *alphas.values()):
        if type(alpha) not in (int, float) or not 0 < alpha < 1e6:
            raise ManifestError(f"lora_alpha {brief(alpha)} is not a number between 0 and 1e6")
    for name in ("use_rslora", "use_dora"):
        if type(options[name]) is not bool:
            raise ManifestError(f"{name} must be true or false, not {brief(options[name])}")
    if type(options["lora_dropout"]) not in (int, float) or not 0 <= options["lora_dropout"] < 1:
        raise ManifestError(f"lora_dropout {brief(options['lora_dropout'])} is not a number from 0 to below 1")
