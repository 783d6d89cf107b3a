"""LoRA in training: PEFT's layers around the linear modules that the recipe names."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from peft import LoraConfig, inject_adapter_in_model

from finetune.interfaces import Part
from finetune.methods.lora_forward import fold_additions
from finetune.methods.lora_options import MAGNITUDE, PREFIX
from finetune.methods.peft_layers import ADAPTER_NAME, peft_layers
from finetune.methods.targets import resolve_targets
from finetune.tables import FIXED_PEFT_CONFIG

if TYPE_CHECKING:
    from collections.abc import Mapping

    from torch import nn

    from finetune.interfaces import Host
    from finetune.recipe import LoraSection


def attach_lora(host: Host, options: LoraSection) -> Part:
    """Add fresh trainable weights; B is zero, so outputs do not change.

    Raises:
        MethodError: the base lacks a tower, or a tower's target matches nothing.
    """
    modules, notes = resolve_targets(host, options.towers)
    ranks: dict[str, int] = {}
    alphas: dict[str, float] = {}
    for tower, names in modules.items():
        target = options.towers.of(tower)
        for name in names:
            if target.r is not None and target.r != options.r:
                ranks[name] = target.r
            if target.lora_alpha is not None and target.lora_alpha != options.lora_alpha:
                alphas[name] = target.lora_alpha
    chosen = {
        "r": options.r,
        "lora_alpha": options.lora_alpha,
        "lora_dropout": options.lora_dropout,
        "use_rslora": options.use_rslora,
        "use_dora": options.use_dora,
        "rank_pattern": ranks,
        "alpha_pattern": alphas,
    }
    names = [name for names in modules.values() for name in names]
    _inject(host.model, names, chosen)
    parameters = _parameters(host.model)
    for name in names:
        fold_additions(host.model.get_submodule(name))
    for parameter in parameters.values():
        # Small updates would be rounded away in the half precision of a base; PEFT's layers cast their inputs.
        parameter.data = parameter.data.float()
    return Part(
        method="lora",
        options=chosen,
        modules=modules,
        parameters=parameters,
        # B starts at zero, so the gradient of A is zero until B has moved once.
        alive_after={name: 2 if ".lora_A." in name else 1 for name in parameters},
        learning_rates=_learning_rates(parameters, modules, options),
        notes=tuple(notes),
    )


def _inject(model: nn.Module, modules: list[str], options: Mapping[str, Any]) -> None:
    chosen = {**options, **FIXED_PEFT_CONFIG, "inference_mode": False}
    inject_adapter_in_model(LoraConfig(**chosen, target_modules=list(modules)), model, ADAPTER_NAME)


def _learning_rates(
    parameters: Mapping[str, nn.Parameter], modules: Mapping[str, list[str]], options: LoraSection
) -> dict[str, float]:
    """Return parameter name -> the factor on the learning rate, without factors of 1."""
    of_tower = {name: options.towers.of(tower).lr_ratio for tower, names in modules.items() for name in names}
    rates = {}
    for name in parameters:
        module = name.removeprefix(PREFIX).rpartition(".lora_")[0]
        rates[name] = of_tower[module] * (options.loraplus_lr_ratio if ".lora_B." in name else 1)
    return {name: rate for name, rate in rates.items() if rate != 1}


def _parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """Return the saved name of each tensor of the adapter in training -> the live parameter."""
    parameters: dict[str, nn.Parameter] = {}
    for name, layer in peft_layers(model):
        for part in ("lora_A", "lora_B"):
            parameters[f"{PREFIX}{name}.{part}.weight"] = getattr(layer, part)[ADAPTER_NAME].weight
        if ADAPTER_NAME in layer.lora_magnitude_vector:
            parameters[f"{PREFIX}{name}.{MAGNITUDE}"] = layer.lora_magnitude_vector[ADAPTER_NAME].weight
    return parameters
