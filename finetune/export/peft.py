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
        bake_scaling: True to multiply LoRA's scaling into B, so that ``lora_alpha == r``, without rslora and
            patterns.
    """

    bake_scaling: bool = False

    def refuse(self, manifest: AdapterManifest) -> None:
        """Check that PEFT has a method that computes the same.

        Raises:
            ExportError: PEFT has no such method, or the adapter has no scaling to bake.
        """
        refuse_ours(manifest)
        if self.bake_scaling and manifest.adapter.peft_type != "LORA":
            raise ExportError(
                f"bake_scaling needs a LoRA, got {manifest.adapter.methods} ({manifest.full_name}). Leave it out."
            )

    def make(self, source: Source, folder: Path) -> list[Comparison]:
        """Write config, weights and card, and let PEFT load them on the base."""
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
            raise ExportError(f"{WEIGHTS_NAME} must hold {len(tensors)} tensors, got {len(written)}. Export it again.")
        return [
            compare_tensors(f"the {len(pairs)} tensors of {WEIGHTS_NAME} with those of the adapter", pairs),
            compare_with_peft(source, folder),
        ]


def _name(tensor: str) -> str:
    """Return the name of a tensor that transformers finds too; for a DoRA's magnitudes it differs from PEFT's."""
    return f"{tensor}.weight" if tensor.endswith(".lora_magnitude_vector") else tensor


def refuse_ours(manifest: AdapterManifest) -> None:
    """Check that a format of PEFT holds the adapter.

    Raises:
        ExportError: PEFT has no format for it.
    """
    if manifest.adapter.peft_type != OURS:
        return
    methods = [part.method for part in manifest.adapter.parts]
    if len(methods) > 1:
        reason = f"it holds {manifest.adapter.methods}, and PEFT's format holds one method"
    elif methods == ["prompt_tuning"]:
        reason = (
            "PEFT puts a prompt before the embeddings and drops the token ids, and a "
            f"{manifest.base.model_type} needs them for its positions or masks, so its answers would differ"
        )
    else:
        reason = f"PEFT's format holds no {manifest.adapter.methods}"
    instead = "Load it with finetune.load(...)" + (
        "." if UNMERGEABLE.keys() & {*methods} else ", or export it as a whole model: --to merged."
    )
    raise ExportError(f"{manifest.full_name} cannot be written for PEFT: {reason}. {instead}")


def compare_with_peft(source: Source, folder: Path) -> Comparison:
    """Let PEFT load ``folder`` on the base, which it wraps, and compare its outputs with the adapter's.

    Raises:
        ExportError: PEFT cannot load the folder.
    """
    from peft import PeftModel

    try:
        model: Any = PeftModel.from_pretrained(cast("Any", source.base.model), folder)
    except (ValueError, RuntimeError, KeyError, TypeError) as error:
        raise ExportError(f"PEFT cannot load the written files: {str(error).strip().splitlines()[0]}") from error
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
        checks="`export.json` lists what was compared before the folder was declared good, and with which versions.",
    )
