"""A whole adapter: in training inside its model, or finished as updates of the modules that it changes."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from finetune.errors import ManifestError, MethodError
from finetune.interfaces import Attachment
from finetune.lookup import did_you_mean
from finetune.methods.hooks import reached
from finetune.methods.peft_layers import peft_layers
from finetune.methods.prompt_tuning import placeholders_of
from finetune.plugins import find, in_use, names

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from torch import Tensor
    from transformers import PreTrainedModel

    from finetune.adapters.manifest import AdapterDescription
    from finetune.core.batch import Placeholders
    from finetune.interfaces import Host, Method, Towers, Update
    from finetune.recipe import MethodSection


def attach(host: Host, sections: Sequence[MethodSection]) -> Attachment:
    """Add a fresh trainable adapter.

    Args:
        host: the base; it must carry no adapter yet.
        sections: the recipe's methods, each at most once.

    Raises:
        MethodError: the base already carries an adapter, or a method does not fit it; the base is unchanged then.
    """
    _refuse_adapted(host.model)
    by_name = {section.name: section for section in sections}
    try:
        # In the order of the table, so that each method sees the earlier ones, in any order of the recipe.
        parts = [_method(name).attach(host, by_name[name]) for name in names("methods") if name in by_name]
        attachment = Attachment(tuple(parts))
        _only_the_adapter_trains(host.model, attachment)
    except BaseException:
        detach(host.model)
        raise
    return attachment


def check_methods(model: PreTrainedModel, towers: Towers, sections: Sequence[MethodSection]) -> None:
    """Check by names that a model has the modules of a recipe's methods; it may be on the meta device.

    Raises:
        MethodError: the model lacks such a module; the message names the key of the recipe and the choices.
    """
    for section in sections:
        _method(section.name).check(model, towers, section)


def refuse_attached(model: PreTrainedModel) -> None:
    """Raise MethodError if an adapter trains in the model, since finished adapters need the plain base."""
    if any(_method(name).is_attached(model) for name in in_use("methods")):
        raise MethodError(
            "finished adapters need a base without an adapter in training. Load a fresh base, or detach that adapter."
        )


def detach(model: PreTrainedModel) -> None:
    """Remove the adapter in training completely."""
    for name in in_use("methods"):
        _method(name).detach(model)


def switch(model: PreTrainedModel, on: bool) -> None:
    """Switch the adapter in training on, or off for the plain base."""
    for name in in_use("methods"):
        _method(name).switch(model, on)


def expected_tensors(
    model: PreTrainedModel, towers: Towers, description: AdapterDescription
) -> dict[str, tuple[int, ...]]:
    """Return name -> shape of the tensors that an adapter with this description must have on ``model``.

    Raises:
        ManifestError: a part does not fit this base.
    """
    expected: dict[str, tuple[int, ...]] = {}
    for part in description.parts:
        expected |= _method(part.method).expected_tensors(model, towers, part)
    return expected


def require_expected(model: PreTrainedModel, towers: Towers, description: AdapterDescription) -> None:
    """Check that an adapter's tensors are exactly those of its modules on this base.

    Raises:
        ManifestError: a tensor is missing, unknown or of another shape, or a part does not fit this base.
    """
    expected = expected_tensors(model, towers, description)
    table = {name: tuple(entry.shape) for name, entry in description.tensors.items()}
    missing, extra = sorted(set(expected) - set(table)), sorted(set(table) - set(expected))
    if missing or extra:
        hint = did_you_mean(extra[0], missing) if extra else ""
        raise ManifestError(
            f"the adapter's tensors must be those of its modules on this base: {len(missing)} missing "
            f"({', '.join(missing[:2])}), {len(extra)} unknown ({', '.join(extra[:2])}).{hint}"
        )
    for name, shape in expected.items():
        if table[name] != shape:
            raise ManifestError(f"{name} must have the shape {list(shape)} on this base, got {list(table[name])}")


def updates(
    model: PreTrainedModel, description: AdapterDescription, tensors: Mapping[str, Tensor]
) -> dict[str, Update]:
    """Return full module name -> the update of a finished adapter for it; the model itself is not changed.

    Args:
        model: the base model.
        description: the description of the adapter, from the manifest.
        tensors: the tensors, exactly those of ``expected_tensors``.

    Raises:
        ManifestError: two of its methods change one module.
    """
    found: dict[str, Update] = {}
    for part in description.parts:
        own = _method(part.method).updates(model, part, tensors)
        if twice := found.keys() & own.keys():
            raise ManifestError(f"each module must be changed by one method, but two methods change {min(twice)!r}")
        found |= own
    return found


@torch.no_grad()
def merge(updates: Mapping[str, Update]) -> None:
    """Write a finished adapter into the weights of its base. No adapter fits that base afterwards.

    Args:
        updates: the updates, from ``updates``.

    Raises:
        MethodError: a part cannot be merged, or the weights are quantized; nothing is written then.
    """
    for write in [update.merging(name) for name, update in updates.items()]:
        write()


def placeholders(description: AdapterDescription) -> Placeholders | None:
    """Return the placeholders that rows must hold for a finished adapter; None if it has no prompt."""
    return next((placeholders_of(p.options) for p in description.parts if p.method == "prompt_tuning"), None)


def _method(name: str) -> Method:
    return find("methods", name, what="method of the adapter", error=ManifestError)()


def _refuse_adapted(model: PreTrainedModel) -> None:
    for name, _ in peft_layers(model):
        raise MethodError(
            f"the model must not carry an adapter, but has one at {name}. Load a fresh base: adapters cannot be "
            "stacked."
        )
    if reached(model) or any(_method(name).is_attached(model) for name in in_use("methods")):
        raise MethodError(
            "the model must not carry an adapter, but has one. Load a fresh base: adapters cannot be stacked."
        )


def _only_the_adapter_trains(model: PreTrainedModel, attachment: Attachment) -> None:
    ours = {id(p) for p in attachment.parameters.values()}
    strays = [name for name, p in model.named_parameters() if p.requires_grad and id(p) not in ours]
    frozen = [name for name, p in attachment.parameters.items() if not p.requires_grad]
    if strays or frozen:
        raise MethodError(
            f"all parameters of the adapter must train, and no others: {strays[:5]} of the base would train, and "
            f"{frozen[:5]} of the adapter would not"
        )
