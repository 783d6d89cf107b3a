"""A linear head of a task, which replaces the base's language head; its outputs are not logits of tokens."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from finetune.errors import ManifestError, MethodError, brief
from finetune.interfaces import Part
from finetune.methods.copies import CopiesMethod, CopiesUpdate, by_module
from finetune.methods.modules import language_head, module_at

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from torch import Tensor

    from finetune.adapters.manifest import PartDescription
    from finetune.interfaces import Host, Towers, Update
    from finetune.recipe import HeadSection

_STD = 0.02  # of fresh weights


class Head(CopiesMethod):
    """A head of ``num_outputs`` values per token; while it is active, the model returns them as its logits."""

    trained = "_finetune_head"

    def attach(self, host: Host, options: HeadSection) -> Part:
        """Add a fresh head: normal weights, and a bias of zero if the language head has a bias.

        Raises:
            MethodError: the base has no language head, or a quantized one.
        """
        copies = {}
        for name, own in _own(host.model).items():
            fresh = nn.Parameter(torch.zeros((options.num_outputs, *own.shape[1:]), device=own.device))
            if fresh.ndim > 1:
                nn.init.normal_(fresh, std=_STD)
            copies[name] = fresh
        self.put(host.model, copies)
        return Part(
            method="head",
            options={"num_outputs": options.num_outputs},
            modules={"language": list(copies)},
            parameters=copies,
            alive_after=dict.fromkeys(copies, 1),
            learning_rates=dict.fromkeys(copies, options.lr_ratio) if options.lr_ratio != 1 else {},
            unit="parameters",
        )

    def check(self, model: nn.Module, towers: Towers, options: HeadSection) -> None:
        """Raise MethodError if the base has no language head, or a quantized one."""
        _own(model)

    def expected_tensors(
        self, model: nn.Module, towers: Towers, description: PartDescription
    ) -> dict[str, tuple[int, ...]]:
        """Return name -> shape of the head's parameters.

        Raises:
            ManifestError: the options or the names do not fit this base.
        """
        outputs = description.options.get("num_outputs")
        if set(description.options) != {"num_outputs"} or type(outputs) is not int or not 1 <= outputs <= 2**20:
            raise ManifestError(
                f"the options of a head must be num_outputs, from 1 to {2**20}, got {description.options}"
            )
        try:
            own = _own(model)
        except MethodError as error:
            raise ManifestError(str(error)) from None
        if description.places != [("language", name) for name in own]:
            raise ManifestError(
                f"a head on this base must replace {', '.join(own)} of the language tower, got "
                f"{brief(description.places)}"
            )
        return {name: (outputs, *parameter.shape[1:]) for name, parameter in own.items()}

    def updates(
        self, model: nn.Module, description: PartDescription, tensors: Mapping[str, Tensor]
    ) -> dict[str, Update]:
        """Return the update of the language head."""
        ((path, own),) = by_module({name: tensors[name] for name in description.names}).items()
        return {path: HeadUpdate(module_at(model, path), own)}


class HeadUpdate(CopiesUpdate):
    """A finished head."""

    def merging(self, name: str) -> Callable[[], None]:
        """Raise MethodError: the language head has another shape."""
        raise MethodError(
            f"{name} cannot be merged: a head of the task with another shape replaces it. Use the adapter "
            "without merging."
        )


def _own(model: Any) -> dict[str, nn.Parameter]:
    """Return the parameters of the base's language head, by full name.

    Raises:
        MethodError: the base has no language head, or a quantized one.
    """
    head = language_head(model)
    if head is None:
        raise MethodError(
            f"a head of the task needs a base with a language head, and {type(model).__name__} has none. Choose "
            "another base."
        )
    path = next(name for name, module in model.named_modules() if module is head)
    own = {f"{path}.{leaf}": parameter for leaf, parameter in head.named_parameters(recurse=False)}
    if quantized := next((name for name, parameter in own.items() if not parameter.is_floating_point()), None):
        raise MethodError(
            f"a head of the task cannot replace {quantized}, which is quantized. Load the base without quantization."
        )
    return own
