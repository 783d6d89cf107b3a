"""The allowed options and the tensor names of a finished LoRA. Imports no PEFT, so any environment can check them."""

from collections.abc import Mapping
from typing import Any

from finetune.errors import ManifestError, brief
from finetune.tables import LORA_OPTIONS

PREFIX = "base_model.model."  # of every tensor name in a PEFT folder
MAGNITUDE = "lora_magnitude_vector"  # PEFT's name for it in a saved file


def check_options(options: Mapping[str, Any], modules: list[str]) -> None:
    """Raise ManifestError unless ``options`` are those of our LoRA, with values that PEFT uses unchanged."""
    if set(options) != LORA_OPTIONS:
        raise ManifestError(
            f"the options of a LoRA adapter must be {', '.join(sorted(LORA_OPTIONS))}, got {brief([*options], 200)}"
        )
    if type(options["r"]) is not int or not 1 <= options["r"] <= 4096:
        raise ManifestError(f"r must be a whole number from 1 to 4096, got {brief(options['r'])}")
    ranks, alphas = options["rank_pattern"], options["alpha_pattern"]
    for name, pattern in (("rank_pattern", ranks), ("alpha_pattern", alphas)):
        if not isinstance(pattern, dict) or not set(pattern) <= set(modules):
            raise ManifestError(f"{name} must map names of the adapter's modules, got {brief(pattern)}")
    for name, rank in ranks.items():
        if type(rank) is not int or not 1 <= rank <= 4096:
            raise ManifestError(f"the rank of {name!r} must be a whole number from 1 to 4096, got {brief(rank)}")
    for alpha in (options["lora_alpha"], *alphas.values()):
        if type(alpha) not in (int, float) or not 0 < alpha < 1e6:
            raise ManifestError(f"lora_alpha must be a number above 0 and below 1e6, got {brief(alpha)}")
    for name in ("use_rslora", "use_dora"):
        if type(options[name]) is not bool:
            raise ManifestError(f"{name} must be true or false, got {brief(options[name])}")
    if type(options["lora_dropout"]) not in (int, float) or not 0 <= options["lora_dropout"] < 1:
        raise ManifestError(f"lora_dropout must be a number from 0 to below 1, got {brief(options['lora_dropout'])}")
