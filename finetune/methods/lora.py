"""LoRA: a low-rank update beside frozen linear modules (Hu et al., https://arxiv.org/abs/2106.09685).

The layers are PEFT's; which modules they wrap, and the config they are made from, is decided here, by full name.
"""

from __future__ import annotations

import warnings
from typing import TYPE_CHECKING, Any

import torch
from peft import LoraConfig, inject_adapter_in_model
from peft.tuners.lora import LoraLayer
from peft.tuners.tuners_utils import BaseTunerLayer

from finetune.errors import ManifestError, MethodError, brief
from finetune.interfaces import Part
from finetune.methods.lora_forward import fold_additions
from finetune.methods.targets import is_inside_a_layer, resolve_targets
from finetune.tables import FIXED_PEFT_CONFIG, LORA_OPTIONS

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from torch import Tensor, nn

    from finetune.adapters.manifest import PartDescription
    from finetune.interfaces import Host, Towers
    from finetune.recipe import LoraSection

_PREFIX = "base_model.model."  # of every tensor name in a PEFT folder
_MAGNITUDE = "lora_magnitude_vector"  # DoRA's, as PEFT saves it


class Lora:
    """LoRA, rsLoRA and DoRA on linear modules; A and B may learn at different rates (LoRA+)."""

    def attach(self, host: Host, adapter_name: str, options: LoraSection) -> Part:
        """Adds fresh trainable weights; B is zero, so outputs do not change.

        Raises:
            MethodError: a tower's target matches nothing.
        """
        modules, notes = resolve_targets(host, options.towers)
        ranks: dict[str, int] = {}
        alphas: dict[str, float] = {}
        for tower, names in modules.items():
            target = getattr(options.towers, tower)
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
        _inject(host.model, adapter_name, names, chosen, trainable=True)
        parameters = _parameters(host.model, adapter_name)
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

    def attach_saved(
        self, model: nn.Module, adapter_name: str, description: PartDescription, tensors: Mapping[str, Tensor]
    ) -> None:
        """Adds a finished part.

        Args:
            model: the base, which may already carry other finished adapters.
            adapter_name: the name the layers know it by.
            description: the manifest's.
            tensors: exactly the tensors that ``expected_tensors`` names.
        """
        with torch.random.fork_rng(devices=[]):  # PEFT draws weights that are thrown away
            _inject(model, adapter_name, description.names, description.options, trainable=False)
        parameters = _parameters(model, adapter_name)
        assert set(parameters) == set(tensors), "expected_tensors was not asked first"
        for module in model.modules():
            if isinstance(module, LoraLayer):
                module.eval()  # new layers start in training mode, where their dropout is at work
        for name, parameter in parameters.items():
            # As it was trained: in fp32, whatever the base is held in.
            parameter.data = tensors[name].to(parameter.device, torch.float32, copy=True)

    def expected_tensors(
        self, model: nn.Module, towers: Towers, description: PartDescription
    ) -> dict[str, tuple[int, ...]]:
        """Returns name -> shape of what a part described so must hold on ``model``.

        Raises:
            ManifestError: a module is missing or not linear, or a rank is out of range.
        """
        options = description.options
        check_options(options, description.names)
        expected: dict[str, tuple[int, ...]] = {}
        for tower, name in description.places:
            try:
                module = model.get_submodule(name)
            except AttributeError:
                raise ManifestError(
                    f"this base has no module {name!r}, which the adapter changes. One that was trained with another "
                    "release of transformers may name its modules otherwise: train it again with this one."
                ) from None
            inside = tuple(f"{path}{end}" for path in getattr(towers, tower) for end in ("", "."))
            if not name.startswith(inside) or is_inside_a_layer(model, name):
                raise ManifestError(f"{name!r} does not stand in the {tower} tower of this base")
            if isinstance(module, BaseTunerLayer):
                module = module.get_base_layer()
            width_in, width_out = getattr(module, "in_features", None), getattr(module, "out_features", None)
            if width_in is None or width_out is None:
                raise ManifestError(f"{name!r} is a {type(module).__name__} on this base, not a linear module")
            r = options["rank_pattern"].get(name, options["r"])
            if type(r) is not int or not 1 <= r <= min(4096, max(width_in, width_out)):
                raise ManifestError(f"rank {brief(r)} of {name!r} is not between 1 and {max(width_in, width_out)}")
            expected[f"{_PREFIX}{name}.lora_A.weight"] = (r, width_in)
            expected[f"{_PREFIX}{name}.lora_B.weight"] = (width_out, r)
            if options["use_dora"]:
                expected[f"{_PREFIX}{name}.{_MAGNITUDE}"] = (width_out,)
        return expected

    def detach(self, model: nn.Module, adapter_name: str) -> None:
        """Removes a part; a layer that then holds none is taken out, so the tree is the base's own again."""
        for name, module in list(model.named_modules()):
            if isinstance(module, LoraLayer):
                if adapter_name in module.lora_A:
                    # Else PEFT warns, and makes another adapter the active one.
                    module._active_adapter = [a for a in module.active_adapters if a != adapter_name]
                    module.delete_adapter(adapter_name)
                if not module.lora_A:
                    parent, _, child = name.rpartition(".")
                    setattr(model.get_submodule(parent), child, module.get_base_layer())
        configs = getattr(model, "peft_config", {})
        configs.pop(adapter_name, None)
        if not configs and "peft_config" in vars(model):
            del model.peft_config

    def merge(self, model: nn.Module, adapter_name: str) -> None:
        """Adds the update to the base's own weights, in their dtype, and removes the layers.

        Raises:
            MethodError: a weight is quantized: rounding the sum again would change every answer a little.
        """
        layers: list[tuple[str, Any]] = [
            (name, module)
            for name, module in model.named_modules()
            if isinstance(module, LoraLayer) and adapter_name in module.lora_A
        ]
        for name, module in layers:
            if not module.get_base_layer().weight.is_floating_point():
                raise MethodError(
                    f"{name} is quantized: an adapter is merged into the 16 or 32 bit base. Load it without "
                    "quantization."
                )
        for _, module in layers:
            module.merge(safe_merge=True, adapter_names=[adapter_name])
            module.merged_adapters = []  # what is merged stays merged when the layer goes
        self.detach(model, adapter_name)

    def switch(self, model: nn.Module) -> Callable[[str | None], None] | None:
        """Returns what makes one adapter, or none, the one that the layers add.

        PEFT's own set_adapter walks all modules and touches every parameter's requires_grad.
        """
        layers: list[Any] = [module for module in model.modules() if isinstance(module, LoraLayer)]

        def use(name: str | None) -> None:
            for layer in layers:
                layer._active_adapter = [name] if name is not None else []
                layer._disable_adapters = name is None

        return use if layers else None


def check_options(options: Mapping[str, Any], modules: list[str]) -> None:
    """Raises ManifestError unless ``options`` are those of our LoRA, with values PEFT takes literally."""
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
    for alpha in (options["lora_alpha"], *alphas.values()):
        if type(alpha) not in (int, float) or not 0 < alpha < 1e6:
            raise ManifestError(f"lora_alpha {brief(alpha)} is not a number between 0 and 1e6")
    for name in ("use_rslora", "use_dora"):
        if type(options[name]) is not bool:
            raise ManifestError(f"{name} must be true or false, not {brief(options[name])}")
    if type(options["lora_dropout"]) not in (int, float) or not 0 <= options["lora_dropout"] < 1:
        raise ManifestError(f"lora_dropout {brief(options['lora_dropout'])} is not a number from 0 to below 1")


def _inject(
    model: nn.Module, adapter_name: str, modules: list[str], options: Mapping[str, Any], *, trainable: bool
) -> None:
    lora = LoraConfig(
        **{**options, **FIXED_PEFT_CONFIG, "inference_mode": not trainable},
        target_modules=list(modules),
        init_lora_weights=trainable,
    )
    with warnings.catch_warnings():
        # PEFT warns of a second adapter on one model, which is what this package is for.
        warnings.filterwarnings("ignore", message="Already found a `peft_config` attribute")
        inject_adapter_in_model(lora, model, adapter_name)


def _learning_rates(
    parameters: Mapping[str, nn.Parameter], modules: Mapping[str, list[str]], options: LoraSection
) -> dict[str, float]:
    """Returns parameter name -> what the learning rate is multiplied by, where that is not 1."""
    of_tower = {name: getattr(options.towers, tower).lr_ratio for tower, names in modules.items() for name in names}
    rates = {}
    for name in parameters:
        module = name.removeprefix(_PREFIX).rpartition(".lora_")[0]
        rates[name] = of_tower[module] * (options.loraplus_lr_ratio if ".lora_B." in name else 1)
    return {name: rate for name, rate in rates.items() if rate != 1}


def _parameters(model: nn.Module, adapter_name: str) -> dict[str, nn.Parameter]:
    """Returns the saved name of each tensor of the adapter -> the live parameter."""
    parameters: dict[str, nn.Parameter] = {}
    for name, module in model.named_modules():
        if isinstance(module, LoraLayer) and adapter_name in module.lora_A:
            for part in ("lora_A", "lora_B"):
                parameters[f"{_PREFIX}{name}.{part}.weight"] = getattr(module, part)[adapter_name].weight
            if adapter_name in module.lora_magnitude_vector:
                magnitude: Any = module.lora_magnitude_vector[adapter_name]
                parameters[f"{_PREFIX}{name}.{_MAGNITUDE}"] = magnitude.weight
    return parameters
