"""Layers of PEFT's in a model, found without an import of PEFT, which takes seconds."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Iterator

    from torch import nn

ADAPTER_NAME = "default"  # name of the adapter in training in PEFT's layers


def is_peft_layer(module: nn.Module) -> bool:
    """Return whether a module is a layer of PEFT's; none is while nothing in this process has imported PEFT."""
    layer = getattr(sys.modules.get("peft.tuners.tuners_utils"), "BaseTunerLayer", None)
    return layer is not None and isinstance(module, layer)


def peft_layers(model: nn.Module) -> Iterator[tuple[str, Any]]:
    """Yield the full name and the module of each layer of PEFT's in a model."""
    if "peft" in sys.modules:
        yield from ((name, module) for name, module in model.named_modules() if is_peft_layer(module))
