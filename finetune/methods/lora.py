"""LoRA: a low-rank update beside frozen linear modules (Hu et al., https://arxiv.org/abs/2106.09685).

In training, the layers are PEFT's (``lora_training``). A finished LoRA has no layers and needs no PEFT: it is an update
for each module that they wrapped.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import torch

from finetune.errors import ManifestError, brief
from finetune.methods.lora_options import MAGNITUDE, PREFIX, check_options
from finetune.methods.lora_update import DoraUpdate, LoraUpdate
from finetune.methods.modules import module_at, tower_paths
from finetune.methods.peft_layers import peft_layers
from finetune.methods.targets import named_targets

if TYPE_CHECKING:
    from collections.abc import Mapping

    from torch import Tensor, nn

    from finetune.adapters.manifest import PartDescription
    from finetune.interfaces import Host, Part, Towers, Update
    from finetune.recipe import LoraSection


class Lora:
    """LoRA, rsLoRA and DoRA on linear modules; A and B may learn at different rates (LoRA+)."""

    def attach(self, host: Host, options: LoraSection) -> Part:
        """Add fresh trainable weights; B is zero, so outputs do not change.

        Raises:
            MethodError: the base lacks a tower, or a tower's target matches nothing.
        """
        from finetune.methods.lora_training import attach_lora  # imports PEFT, which takes seconds

        return attach_lora(host, options)

    def check(self, model: nn.Module, towers: Towers, options: LoraSection) -> None:
        """Raise MethodError if a name in the recipe matches no linear module of its tower."""
        named_targets(model, towers, options.towers)

    def detach(self, model: nn.Module) -> None:
        """Take the layers out, so that the tree is the base's own again."""
        for name, layer in list(peft_layers(model)):
            parent, _, child = name.rpartition(".")
            setattr(model.get_submodule(parent), child, layer.get_base_layer())
        vars(model).pop("peft_config", None)

    def is_attached(self, model: nn.Module) -> bool:
        """Return whether the model holds a layer of PEFT's."""
        return any(True for _ in peft_layers(model))

    def switch(self, model: nn.Module, on: bool) -> None:
        """Have the layers add their update, or not.

        PEFT's own set_adapter also touches every parameter's requires_grad.
        """
        for _, layer in peft_layers(model):
            layer._disable_adapters = not on

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
            shapes = {"lora_A.weight": (r, width_in), "lora_B.weight": (width_out, r), MAGNITUDE: (width_out,)}
            expected |= {f"{PREFIX}{name}.{kind}": shapes[kind] for kind in _kinds(options)}
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
                tensors[f"{PREFIX}{name}.{kind}"].to(module.weight.device, torch.float32) for kind in _kinds(options)
            )
            updates[name] = (DoraUpdate if magnitude else LoraUpdate)(module, down, up, scaling, *magnitude)
        return updates


def _kinds(options: Mapping[str, Any]) -> tuple[str, ...]:
    """Return the suffixes of the tensor names of each module."""
    return ("lora_A.weight", "lora_B.weight", *([MAGNITUDE] if options["use_dora"] else []))
