"""A whole adapter: its methods attached, loaded, switched, merged and removed together."""

from __future__ import annotations

from typing import TYPE_CHECKING

from peft.tuners.tuners_utils import BaseTunerLayer

from finetune.errors import ManifestError, MethodError
from finetune.interfaces import Attachment
from finetune.lookup import did_you_mean, import_string, look_up
from finetune.methods.prompt_tuning import placeholders_of
from finetune.tables import METHODS

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from torch import Tensor
    from transformers import PreTrainedModel

    from finetune.adapters.manifest import AdapterDescription
    from finetune.batch import Placeholders
    from finetune.interfaces import Host, Method, Towers
    from finetune.recipe import MethodSection


def attach(host: Host, sections: Sequence[MethodSection], adapter_name: str = "default") -> Attachment:
    """Adds a fresh trainable adapter.

    Args:
        host: the base; it must carry no adapter yet.
        sections: the recipe's methods, each at most once.
        adapter_name: what its layers know it by.

    Raises:
        MethodError: the base already carries an adapter, or a method does not fit it; the base is as it was.
    """
    _refuse_adapted(host.model)
    by_name = {section.name: section for section in sections}
    try:
        # In the order of the table, so that each method finds those before it, whatever order the recipe has.
        parts = [_method(name).attach(host, adapter_name, by_name[name]) for name in METHODS if name in by_name]
        attachment = Attachment(adapter_name, tuple(parts))
        switch(host.model)(adapter_name)
        _only_the_adapter_trains(host.model, attachment)
    except BaseException:
        detach(host.model, adapter_name)
        raise
    return attachment


def attach_saved(
    model: PreTrainedModel,
    towers: Towers,
    adapter_name: str,
    description: AdapterDescription,
    tensors: Mapping[str, Tensor],
) -> None:
    """Adds a finished adapter beside those that are there; on any failure the model is as it was before.

    Args:
        model: the base, with or without other finished adapters.
        towers: where its towers are.
        adapter_name: what its layers are to know it by.
        description: the manifest's.
        tensors: exactly those that ``expected_tensors`` names.
    """
    try:
        for part in description.parts:
            method = _method(part.method)
            own = {name: tensors[name] for name in method.expected_tensors(model, towers, part)}
            method.attach_saved(model, adapter_name, part, own)
    except BaseException:
        detach(model, adapter_name)
        raise


def expected_tensors(
    model: PreTrainedModel, towers: Towers, description: AdapterDescription
) -> dict[str, tuple[int, ...]]:
    """Returns name -> shape of the tensors that an adapter described so must have on ``model``.

    Raises:
        ManifestError: a part does not fit this base.
    """
    expected: dict[str, tuple[int, ...]] = {}
    for part in description.parts:
        expected |= _method(part.method).expected_tensors(model, towers, part)
    return expected


def require_expected(model: PreTrainedModel, towers: Towers, description: AdapterDescription) -> None:
    """Checks that an adapter's tensors are exactly those its modules have on this base.

    Raises:
        ManifestError: a tensor is missing, unknown or of another shape, or a part does not fit this base.
    """
    expected = expected_tensors(model, towers, description)
    table = {name: tuple(entry.shape) for name, entry in description.tensors.items()}
    missing, extra = sorted(set(expected) - set(table)), sorted(set(table) - set(expected))
    if missing or extra:
        hint = did_you_mean(extra[0], missing) if extra else ""
        raise ManifestError(
            f"the adapter's tensors are not those its modules have: {len(missing)} missing "
            f"({', '.join(missing[:2])}), {len(extra)} unknown ({', '.join(extra[:2])}).{hint}"
        )
    for name, shape in expected.items():
        if table[name] != shape:
            raise ManifestError(f"{name} has shape {list(table[name])}; on this base it must be {list(shape)}")


def detach(model: PreTrainedModel, adapter_name: str) -> None:
    """Removes an adapter and every trace of it."""
    for name in METHODS:
        _method(name).detach(model, adapter_name)


def merge(model: PreTrainedModel, adapter_name: str) -> None:
    """Writes an adapter into the base's own weights and removes it; afterwards no adapter is active.

    Raises:
        MethodError: a part cannot be merged, or would go into quantized weights; nothing was merged, and the adapter
            is the active one.
    """
    switch(model)(None)  # else LoRA would go into another adapter's parameters, where those stand in place
    try:
        # The prompt's comes first, since it can only refuse; LoRA's refuses before it writes.
        for name in sorted(METHODS, key=lambda name: name != "prompt_tuning"):
            _method(name).merge(model, adapter_name)
    except MethodError:
        switch(model)(adapter_name)
        raise


def switch(model: PreTrainedModel) -> Callable[[str | None], None]:
    """Returns what makes one adapter answer, or none; valid until an adapter is attached or removed."""
    switches = [each for name in METHODS if (each := _method(name).switch(model)) is not None]

    def use(adapter_name: str | None) -> None:
        for each in switches:
            each(adapter_name)

    return use


def placeholders(description: AdapterDescription) -> Placeholders | None:
    """Returns what rows must hold for a finished adapter; None where it has no prompt."""
    return next((placeholders_of(p.options) for p in description.parts if p.method == "prompt_tuning"), None)


def _method(name: str) -> Method:
    return import_string(look_up(METHODS, name, what="method of the adapter", error=ManifestError))()


def _refuse_adapted(model: PreTrainedModel) -> None:
    for name, module in model.named_modules():
        if isinstance(module, BaseTunerLayer):
            raise MethodError(
                f"the model already carries an adapter (at {name}). Load a fresh base, or train with this one: "
                "adapters are not stacked."
            )
    if any(_method(name).switch(model) is not None for name in METHODS):
        raise MethodError("the model already carries an adapter. Load a fresh base: adapters are not stacked.")


def _only_the_adapter_trains(model: PreTrainedModel, attachment: Attachment) -> None:
    ours = {id(p) for p in attachment.parameters.values()}
    strays = [name for name, p in model.named_parameters() if p.requires_grad and id(p) not in ours]
    frozen = [name for name, p in attachment.parameters.items() if not p.requires_grad]
    if strays or frozen:
        raise MethodError(f"base parameters would train: {strays[:5]}; adapter parameters would not: {frozen[:5]}")
