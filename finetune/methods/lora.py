"""LoRA: a low-rank update beside frozen linear modules (Hu et al., https://arxiv.org/abs/2106.09685).

In training, the layers are PEFT's. This module chooses the modules that they wrap, by full name, and their config. A
finished LoRA has no layers: it is an update for each of those modules.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import torch
from peft import LoraConfig, inject_adapter_in_model
from peft.tuners.lora import LoraLayer
from peft.tuners.tuners_utils import BaseTunerLayer

from finetune.errors import ManifestError, brief
from finetune.interfaces import Part
from finetune.methods.lora_forward import fold_additions
from finetune.methods.lora_options import check_options
from finetune.methods.lora_update import DoraUpdate, LoraUpdate
from finetune.methods.modules import module_at, tower_paths
from finetune.methods.targets import named_targets, resolve_targets
from finetune.tables import FIXED_PEFT_CONFIG

if TYPE_CHECKING:
    from collections.abc import Mapping

    from torch import Tensor, nn

    from finetune.adapters.manifest import PartDescription
    from finetune.interfaces import Host, Towers, Update
    from finetune.recipe import LoraSection

ADAPTER_NAME = "default"  # name of the adapter in training in PEFT's layers
_PREFIX = "base_model.model."  # of every tensor name in a PEFT folder
_MAGNITUDE = "lora_magnitude_vector"  # PEFT's name for it in a saved file


class Lora:
    """LoRA, rsLoRA and DoRA on linear modules; A and B may learn at different rates (LoRA+)."""

    def attach(self, host: Host, options: LoraSection) -> Part:
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

    def check(self, model: nn.Module, towers: Towers, options: LoraSection) -> None:
        """Raise MethodError if a name in the recipe matches no linear module of its tower."""
        named_targets(model, towers, options.towers)

    def detach(self, model: nn.Module) -> None:
        """Take the layers out, so that the tree is the base's own again."""
        for name, module in list(model.named_modules()):
            if isinstance(module, LoraLayer):
                parent, _, child = name.rpartition(".")
                setattr(model.get_submodule(parent), child, module.get_base_layer())
        vars(model).pop("peft_config", None)

    def is_attached(self, model: nn.Module) -> bool:
        """Return whether the model holds a layer of PEFT's."""
        return any(isinstance(module, BaseTunerLayer) for module in model.modules())

    def switch(self, model: nn.Module, on: bool) -> None:
        """Have the layers add their update, or not.

        PEFT's own set_adapter also touches every parameter's requires_grad.
        """
        for module in model.modules():
            if isinstance(module, LoraLayer):
                module._disable_adapters = not on

    def expected_tensors(
        self, model: nn.Module, towers: Towers, description: PartDescription
    ) -> dict[str, tuple[int, ...]]:
        """Return name -> shape of the tensors that a part with this description must hold on ``model``.

        Raises:
            ManifestError: a module is missing or not linear, or an option is out of range.
        """
        options = description.options
        check_options(options, description.names)
        expected: dict[str, tuple[int, ...]] = {}
        for tower, name in description.places:
            try:
                module = module_at(model, name)
            except KeyError:
                raise ManifestError(
                    f"this base has no module {name!r}, which the adapter changes. Another release of transformers may "
                    "use other names: train the adapter again with this release."
                ) from None
            inside = tuple(f"{path}{end}" for path in tower_paths(towers, tower) for end in ("", "."))
            if not name.startswith(inside):
                raise ManifestError(f"{name!r} must be in the {tower} tower of this base, and is not")
            width_in, width_out = getattr(module, "in_features", None), getattr(module, "out_features", None)
            if width_in is None or width_out is None:
                raise ManifestError(f"{name!r} must be a linear module on this base, got a {type(module).__name__}")
            r = options["rank_pattern"].get(name, options["r"])
            if type(r) is not int or not 1 <= r <= (largest := min(4096, max(width_in, width_out))):
                raise ManifestError(f"the rank of {name!r} must be from 1 to {largest}, got {brief(r)}")
            if options["use_dora"] and module.weight.dtype == torch.int8:
                raise ManifestError(
                    f"the adapter is a DoRA, which needs the row norms of {name!r}, but the base holds it in 8 bit. "
                    "Load the base with quantization='4bit', or without quantization."
                )
            shapes = {"lora_A.weight": (r, width_in), "lora_B.weight": (width_out, r), _MAGNITUDE: (width_out,)}
            expected |= {f"{_PREFIX}{name}.{kind}": shapes[kind] for kind in _kinds(options)}
        return expected

    def updates(
        self, model: nn.Module, description: PartDescription, tensors: Mapping[str, Tensor]
    ) -> dict[str, Update]:
        """Return full module name -> the update of a finished part for that module."""
        options = description.options
        updates: dict[str, Update] = {}
        for name in description.names:
            module: Any = module_at(model, name)
            r = options["rank_pattern"].get(name, options["r"])
            alpha = options["alpha_pattern"].get(name, options["lora_alpha"])
            scaling = alpha / math.sqrt(r) if options["use_rslora"] else alpha / r
            # In fp32, as in training, for a base of any dtype.
            down, up, *magnitude = (
                tensors[f"{_PREFIX}{name}.{kind}"].to(module.weight.device, torch.float32) for kind in _kinds(options)
            )
            updates[name] = (DoraUpdate if magnitude else LoraUpdate)(module, down, up, scaling, *magnitude)
        return updates


def _kinds(options: Mapping[str, Any]) -> tuple[str, ...]:
    """Return the suffixes of the tensor names of each module."""
    return ("lora_A.weight", "lora_B.weight", *([_MAGNITUDE] if options["use_dora"] else []))


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
        module = name.removeprefix(_PREFIX).rpartition(".lora_")[0]
        rates[name] = of_tower[module] * (options.loraplus_lr_ratio if ".lora_B." in name else 1)
    return {name: rate for name, rate in rates.items() if rate != 1}


def _parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """Return the saved name of each tensor of the adapter in training -> the live parameter."""
    parameters: dict[str, nn.Parameter] = {}
    for name, module in model.named_modules():
        if isinstance(module, LoraLayer):
            for part in ("lora_A", "lora_B"):
                parameters[f"{_PREFIX}{name}.{part}.weight"] = getattr(module, part)[ADAPTER_NAME].weight
            if ADAPTER_NAME in module.lora_magnitude_vector:
                magnitude: Any = module.lora_magnitude_vector[ADAPTER_NAME]
                parameters[f"{_PREFIX}{name}.{_MAGNITUDE}"] = magnitude.weight
    return parameters
