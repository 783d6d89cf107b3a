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

from finetune.errors import ManifestError, MethodError
from finetune.interfaces import Attachment, Towers
from finetune.methods.targets import resolve_targets
from finetune.tables import FIXED_PEFT_CONFIG

if TYPE_CHECKING:
    from collections.abc import Mapping

    from torch import Tensor, nn

    from finetune.adapters.manifest import AdapterDescription
    from finetune.recipe import LoraSection

_PREFIX = "base_model.model."  # of every tensor name in a PEFT folder


class Lora:
    """LoRA with the options of a recipe; a finished adapter brings its own."""

    def __init__(self, options: LoraSection | None = None):
        self.options = options

    def attach(self, model: nn.Module, towers: Towers) -> Attachment:
        """Adds a fresh trainable adapter named ``default``; B is zero, so outputs do not change.

        Raises:
            MethodError: the model already carries an adapter, or a tower's target matches nothing.
        """
        assert self.options is not None
        refuse_wrapped(model)
        options = self.options
        modules = resolve_targets(model, towers, options.towers)
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
            "rank_pattern": ranks,
            "alpha_pattern": alphas,
        }
        config = peft_config([name for names in modules.values() for name in names], chosen)
        _inject(model, "default", config, init_lora_weights=True, inference_mode=False)
        parameters = _parameters(model, "default")
        for parameter in parameters.values():
            # Small updates would be rounded away in the half precision of a base; PEFT's layers cast their inputs.
            parameter.data = parameter.data.float()
        # B starts at zero, so the gradient of A is zero until B has moved once.
        alive_after = {name: 2 if ".lora_A." in name else 1 for name in parameters}
        attachment = Attachment("default", modules, parameters, chosen, config, alive_after)
        _only_the_adapter_trains(model, attachment)
        return attachment

    def attach_saved(
        self,
        model: nn.Module,
        adapter_name: str,
        description: AdapterDescription,
        tensors: Mapping[str, Tensor],
    ) -> Attachment:
        """Adds a finished adapter; on any failure the model is as it was before.

        Args:
            model: the base, which may already carry other finished adapters.
            adapter_name: the name the layers know it by.
            description: the manifest's.
            tensors: exactly the tensors that ``expected_tensors`` names.
        """
        config = peft_config(description.modules, description.options)
        try:
            _inject(model, adapter_name, config, init_lora_weights=False, inference_mode=True)
            parameters = _parameters(model, adapter_name)
            assert set(parameters) == set(tensors), "expected_tensors was not asked first"
            for module in model.modules():
                if isinstance(module, LoraLayer):
                    module.eval()  # new layers start in training mode, where their dropout is at work
            with torch.no_grad():
                for name, parameter in parameters.items():
                    parameter.copy_(tensors[name])
        except BaseException:
            detach(model, adapter_name)
            raise
        return Attachment(adapter_name, {}, parameters, description.options, config)

    def detach(self, model: nn.Module, adapter_name: str) -> None:
        """Removes an adapter and every trace of it."""
        detach(model, adapter_name)

    def expected_tensors(self, model: nn.Module, description: AdapterDescription) -> dict[str, tuple[int, ...]]:
        """Returns name -> shape of what an adapter described so must hold on ``model``.

        Raises:
            ManifestError: a module is missing or not linear, or a rank is out of range.
        """
        options = description.options
        check_options(options, description.modules)
        expected: dict[str, tuple[int, ...]] = {}
        for name in description.modules:
            try:
                module = model.get_submodule(name)
            except AttributeError:
                raise ManifestError(f"this base has no module {name!r}, which the adapter changes") from None
            if isinstance(module, BaseTunerLayer):
                module = module.get_base_layer()
            width_in, width_out = getattr(module, "in_features", None), getattr(module, "out_features", None)
            if width_in is None or width_out is None:
                raise ManifestError(f"{name!r} is a {type(module).__name__} on this base, not a linear module")
            r = options["rank_pattern"].get(name, options["r"])
            if type(r) is not int or not 1 <= r <= min(4096, max(width_in, width_out)):
                raise ManifestError(f"rank {r!r} of {name!r} is not between 1 and {max(width_in, width_out)}")
            expected[f"{_PREFIX}{name}.lora_A.weight"] = (r, width_in)
            expected[f"{_PREFIX}{name}.lora_B.weight"] = (width_out, r)
        return expected


def peft_config(modules: list[str], options: Mapping[str, Any]) -> dict[str, Any]:
    """Returns what ``adapter_config.json`` holds: PEFT's fields, module names in full, nothing that mutates a base."""
    return {**options, "peft_type": "LORA", "target_modules": list(modules), **FIXED_PEFT_CONFIG}


def check_options(options: Mapping[str, Any], modules: list[str]) -> None:
    """Raises ManifestError unless ``options`` are those of our LoRA, with values PEFT takes literally."""
    names = {"r", "lora_alpha", "lora_dropout", "rank_pattern", "alpha_pattern"}
    if set(options) != names:
        wrong = sorted(set(options) ^ names)
        raise ManifestError(f"the options of a LoRA adapter are {', '.join(sorted(names))}; wrong: {', '.join(wrong)}")
    ranks, alphas = options["rank_pattern"], options["alpha_pattern"]
    for name, pattern in (("rank_pattern", ranks), ("alpha_pattern", alphas)):
        if not isinstance(pattern, dict) or not set(pattern) <= set(modules):
            raise ManifestError(f"{name} must map names of the adapter's modules, not {str(pattern)[:80]}")
    for alpha in (options["lora_alpha"], *alphas.values()):
        if type(alpha) not in (int, float) or not 0 < alpha < 1e6:
            raise ManifestError(f"lora_alpha {alpha!r} is not a number between 0 and 1e6")
    if type(options["lora_dropout"]) not in (int, float) or not 0 <= options["lora_dropout"] < 1:
        raise ManifestError(f"lora_dropout {options['lora_dropout']!r} is not a number from 0 to below 1")


def refuse_wrapped(model: nn.Module) -> None:
    """Raises MethodError when ``model`` already carries adapter layers of any kind."""
    for name, module in model.named_modules():
        if isinstance(module, BaseTunerLayer):
            raise MethodError(
                f"the model already carries an adapter (at {name}). Load a fresh base, or train with this one: "
                "adapters are not stacked."
            )


def detach(model: nn.Module, adapter_name: str) -> None:
    """Removes an adapter; a layer that then holds none is taken out, so the tree is the base's own again."""
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


def _inject(
    model: nn.Module,
    adapter_name: str,
    config: Mapping[str, Any],
    *,
    init_lora_weights: bool,
    inference_mode: bool,
) -> None:
    lora = LoraConfig(**{**config, "inference_mode": inference_mode, "init_lora_weights": init_lora_weights})
    with warnings.catch_warnings():
        # PEFT warns of a second adapter on one model, which is what this package is for.
        warnings.filterwarnings("ignore", message="Already found a `peft_config` attribute")
        inject_adapter_in_model(lora, model, adapter_name)


def _parameters(model: nn.Module, adapter_name: str) -> dict[str, nn.Parameter]:
    """Returns the saved name of each tensor of the adapter -> the live parameter."""
    parameters: dict[str, nn.Parameter] = {}
    for name, module in model.named_modules():
        if isinstance(module, LoraLayer) and adapter_name in module.lora_A:
            for part in ("lora_A", "lora_B"):
                parameters[f"{_PREFIX}{name}.{part}.weight"] = getattr(module, part)[adapter_name].weight
    return parameters


def _only_the_adapter_trains(model: nn.Module, attachment: Attachment) -> None:
    ours = {id(p) for p in attachment.parameters.values()}
    strays = [name for name, p in model.named_parameters() if p.requires_grad and id(p) not in ours]
    frozen = [name for name, p in attachment.parameters.items() if not p.requires_grad]
    if strays or frozen:
        raise MethodError(f"base parameters would train: {strays[:5]}; adapter parameters would not: {frozen[:5]}")
