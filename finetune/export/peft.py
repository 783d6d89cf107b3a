"""The target ``peft``: a folder that ``PeftModel.from_pretrained(base, folder)`` opens without this package."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, cast

from safetensors.torch import load_file

from finetune.adapters.card import CARD_NAME, Card, model_card
from finetune.adapters.folder import config_bytes, weights_bytes
from finetune.adapters.manifest import CONFIG_NAME, WEIGHTS_NAME
from finetune.adapters.peft_format import OURS, peft_config
from finetune.errors import ExportError
from finetune.export.parity import compare, compare_tensors, outputs
from finetune.export.scaling import bake_scaling
from finetune.export.snippets import transformers_code
from finetune.tables import UNMERGEABLE

if TYPE_CHECKING:
    from pathlib import Path

    from finetune.adapters.manifest import AdapterManifest
    from finetune.export.target import Comparison, Source

_LOADING = """\
from peft import PeftModel
from transformers import {auto_class}, AutoProcessor

base = {auto_class}.from_pretrained("{base}"{revision})
processor = AutoProcessor.from_pretrained("{base}"{revision})
model = PeftModel.from_pretrained(base, "FOLDER")  # this one"""


@dataclass(frozen=True, kw_only=True)
class Peft:
    """PEFT's format, which transformers and other engines read too.

    Attributes:
        bake_scaling: whether LoRA's scaling is multiplied into B, so that ``lora_alpha == r``, without rslora and
            patterns.
    """

    bake_scaling: bool = False

    def refuse(self, manifest: AdapterManifest) -> None:
        """Raise ExportError where PEFT has no method that computes the same."""
        refuse_ours(manifest)
        if self.bake_scaling and manifest.adapter.peft_type != "LORA":
            raise ExportError(
                f"{manifest.full_name} is a {manifest.adapter.methods}, which has no scaling: leave bake_scaling out."
            )

    def make(self, source: Source, folder: Path) -> list[Comparison]:
        """Write config, weights and card, and have PEFT open them on the base."""
        description = source.manifest.adapter
        tensors, config = dict(source.adapter.tensors), peft_config(description)
        if self.bake_scaling:
            tensors, config = bake_scaling(tensors, config)
        tensors = {_name(name): tensor for name, tensor in tensors.items()}
        identity = source.manifest.base
        config |= {"base_model_name_or_path": identity.hub_id, "revision": identity.revision}
        (folder / WEIGHTS_NAME).write_bytes(weights_bytes(tensors))
        (folder / CONFIG_NAME).write_bytes(config_bytes(config))
        (folder / CARD_NAME).write_text(model_card(source.manifest, _card(source)), encoding="utf-8")
        written = load_file(folder / WEIGHTS_NAME)
        pairs = [(written[name], tensor.cpu()) for name, tensor in tensors.items() if name in written]
        if len(pairs) != len(tensors) or len(written) != len(tensors):
            raise ExportError(f"{WEIGHTS_NAME} holds {len(written)} tensors, written were {len(tensors)}")
        return [
            compare_tensors(f"the {len(pairs)} tensors of {WEIGHTS_NAME} with those of the adapter", pairs),
            compare_with_peft(source, folder),
        ]


def _name(tensor: str) -> str:
    """Return the name by which transformers finds a DoRA's magnitudes too; PEFT finds them by either."""
    return f"{tensor}.weight" if tensor.endswith(".lora_magnitude_vector") else tensor


def refuse_ours(manifest: AdapterManifest) -> None:
    """Raise ExportError where an adapter is in no format of PEFT's."""
    if manifest.adapter.peft_type != OURS:
        return
    methods = [part.method for part in manifest.adapter.parts]
    if len(methods) > 1:
        reason = f"it holds {manifest.adapter.methods}, and PEFT's format holds one method"
    elif methods == ["prompt_tuning"]:
        reason = (
            "PEFT puts a prompt before the embeddings and drops the token ids, from which a "
            f"{manifest.base.model_type} makes its positions or masks: it would answer otherwise"
        )
    else:
        reason = f"PEFT's format holds no {manifest.adapter.methods}"
    instead = "Load it with finetune.load(...)" + (
        "." if UNMERGEABLE.keys() & {*methods} else ", or export it as a whole model: --to merged."
    )
    raise ExportError(f"{manifest.full_name} cannot be written for PEFT: {reason}. {instead}")


def compare_with_peft(source: Source, folder: Path) -> Comparison:
    """Have PEFT load ``folder`` on the base, which it then wraps, and compare its outputs with the adapter's."""
    from peft import PeftModel

    try:
        model: Any = PeftModel.from_pretrained(cast("Any", source.base.model), folder)
    except (ValueError, RuntimeError, KeyError, TypeError) as error:
        raise ExportError(f"PEFT cannot open what was written: {str(error).strip().splitlines()[0]}") from error
    got = outputs(replace(source.base, model=model.eval()), source.rows)
    return compare("PEFT on the same base with the adapter", got, wanted=source.adapted, plain=source.plain)


def _card(source: Source) -> Card:
    identity = source.manifest.base
    loading = _LOADING.format(
        auto_class=source.base.family.auto_class.__name__,
        base=identity.hub_id or "BASE",
        revision=f', revision="{identity.revision}"' if identity.revision else "",
    )
    return Card(
        version=source.version,
        digest=source.adapter.digest,
        library_name="peft",
        loading=transformers_code(source, loading),
        checks="`export.json` says what was compared before the folder was declared good, and with which versions.",
    )
