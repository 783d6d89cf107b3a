"""The target ``gguf``: a LoRA that llama.cpp loads beside the language model of the base."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from finetune.adapters.card import CARD_NAME, Card, model_card
from finetune.adapters.peft_format import peft_config
from finetune.core.extras import require_extra
from finetune.errors import ExportError
from finetune.export.llama_cpp import (
    WITH_IMAGES,
    Dtype,
    Language,
    LoraFile,
    language_of,
    read_lora,
    refuse_model_type,
    rounded,
    write_lora,
)
from finetune.export.parity import ROUNDING, compare, compare_tensors, outputs
from finetune.export.scaling import bake_scaling
from finetune.export.target import Comparison
from finetune.methods.adapter import merge
from finetune.methods.lora_update import LoraUpdate
from finetune.methods.modules import module_at
from finetune.model_types import architecture_of
from finetune.tables import UNMERGEABLE

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from torch import Tensor

    from finetune.adapters.manifest import AdapterManifest, PartDescription
    from finetune.export.target import Source

FILE_NAME = "adapter.gguf"
_PREFIX = "base_model.model."  # of every tensor name in a PEFT folder
# The tolerance for the rounding of a module's update, as a part of its largest value.
_UPDATE_ROUNDING: dict[Dtype, float] = {"float32": 1e-5, "float16": 2e-3}
_LOADING = """\
# base.gguf: the language model of the base, as llama.cpp's convert_hf_to_gguf.py writes it
llama-server --model base.gguf{images} --lora adapter.gguf"""


@dataclass(frozen=True, kw_only=True)
class Gguf:
    """A target that writes llama.cpp's file of a LoRA, with the scaling in its weights: ``adapter.lora.alpha == r``.

    Attributes:
        dtype: the dtype of its tensors.
    """

    dtype: Dtype = "float32"

    def __post_init__(self) -> None:
        if self.dtype not in _UPDATE_ROUNDING:
            raise ExportError(f"dtype must be one of {', '.join(_UPDATE_ROUNDING)}, got {self.dtype!r}")

    def refuse(self, manifest: AdapterManifest) -> None:
        """Check that llama.cpp's LoRA format can hold the adapter.

        Raises:
            ExportError: the format cannot hold a part of the adapter.
        """
        require_extra("gguf", what="--to gguf")
        model_type = manifest.base.model_type
        if (architecture := architecture_of(model_type)) != "generative":
            raise ExportError(
                f"{manifest.full_name} cannot be written as GGUF: the architecture of its base must be generative, got "
                f"{architecture or 'an unknown one'} ({model_type}). Export it with --to "
                f"{'onnx' if architecture == 'dual_encoder' else 'merged'}."
            )
        refuse_model_type(model_type)
        for part in manifest.adapter.parts:
            if reason := _why_not(part):
                raise ExportError(f"{manifest.full_name} cannot be written as GGUF: {reason}")

    def make(self, source: Source, folder: Path) -> list[Comparison]:
        """Write the file and its card, and compare the base with the tensors that are read back."""
        language = language_of(source.base.model.config, source.base.towers)
        names = {language.weight_name(module): module for module in source.manifest.adapter.parts[0].names}
        lora = _to_llama_cpp(source, language, names)
        write_lora(folder / FILE_NAME, lora, dtype=self.dtype, about=_about(source))
        (folder / CARD_NAME).write_text(model_card(source.manifest, _card(source, lora)), encoding="utf-8")
        held = read_lora(folder / FILE_NAME)
        if (held.architecture, held.alpha, held.pairs.keys()) != (lora.architecture, lora.alpha, lora.pairs.keys()):
            raise ExportError(
                f"{FILE_NAME} must hold {lora.architecture}, alpha {lora.alpha} and {len(lora.pairs)} weights, got "
                f"{held.architecture}, alpha {held.alpha} and {len(held.pairs)}. Export it again."
            )
        wanted = [rounded(tensor, self.dtype, name=name) for name, pair in lora.pairs.items() for tensor in pair]
        got = [tensor for name in lora.pairs for tensor in held.pairs[name]]
        equal = compare_tensors(
            f"the {len(got)} tensors of {FILE_NAME} with those of the adapter", zip(got, wanted, strict=True)
        )
        replayed = replay(source, held, language, names)
        return [equal, self._compare_updates(source, replayed), self._compare_outputs(source, replayed)]

    def _compare_updates(self, source: Source, replayed: Mapping[str, LoraUpdate]) -> Comparison:
        off = max(_relative_difference(update, source.updates[module]) for module, update in replayed.items())
        tolerance = _UPDATE_ROUNDING[self.dtype]
        return Comparison(
            what=f"alpha / r * B @ A of {len(replayed)} modules with the adapter's, as parts of their largest values",
            verdict="passed" if off <= tolerance and replayed.keys() == source.updates.keys() else "failed",
            largest_difference=off,
            tolerance=tolerance,
        )

    def _compare_outputs(self, source: Source, replayed: Mapping[str, LoraUpdate]) -> Comparison:
        merge(replayed)
        return compare(
            f"the base with what {FILE_NAME} holds, with the adapter",
            outputs(source.base, source.rows),
            wanted=source.adapted,
            plain=source.plain,
            rounding=ROUNDING[self.dtype],
        )


def _why_not(part: PartDescription) -> str | None:
    """Return the reason why llama.cpp's LoRA cannot hold a part, with another way; None if it can."""
    if part.method in UNMERGEABLE:
        return f"{UNMERGEABLE[part.method]}, and llama.cpp takes only LoRA. Load it with finetune.load(...)."
    instead = "Export it as a whole model, whose language model llama.cpp can convert: --to merged."
    if part.method != "lora":
        return f"it holds {part.method} (whole parameters), and llama.cpp takes only LoRA. {instead}"
    if part.options["use_dora"]:
        return f"it is a DoRA, and llama.cpp's LoRA has no magnitudes. {instead}"
    others = {tower: names for tower, names in part.modules.items() if names and tower != "language"}
    if others:
        first = next(iter(others.values()))[0]
        return (
            f"it also changes {' and '.join(others)} ({first}), and llama.cpp adapts only the language model. Without "
            f"that part the adapter would be another one. {instead}"
        )
    return None


def replay(source: Source, held: LoraFile, language: Language, names: Mapping[str, str]) -> dict[str, LoraUpdate]:
    """Return full module name -> the update that llama.cpp computes there, in the order of transformers.

    Args:
        source: the source of the export, which holds the base.
        held: the contents of the file.
        language: the language model of the base.
        names: llama.cpp's name of a weight -> full module name.
    """
    replayed = {}
    for name, (down, up) in held.pairs.items():
        module: Any = module_at(source.base.model, names[name])
        up = language.from_llama_cpp(names[name], up.float())
        device = module.weight.device
        replayed[names[name]] = LoraUpdate(
            module, down.float().to(device), up.contiguous().to(device), held.alpha / up.shape[1]
        )
    return replayed


def _to_llama_cpp(source: Source, language: Language, names: Mapping[str, str]) -> LoraFile:
    """Return the adapter in llama.cpp's order, with its scaling in B."""
    tensors, config = bake_scaling(source.adapter.tensors, peft_config(source.manifest.adapter))
    pairs: dict[str, tuple[Tensor, Tensor]] = {}
    for name, module in names.items():
        down, up = (tensors[f"{_PREFIX}{module}.lora_{kind}.weight"] for kind in "AB")
        pairs[name] = (down, language.to_llama_cpp(module, up))
    return LoraFile(architecture=language.architecture, alpha=float(config["lora_alpha"]), pairs=pairs)


def _relative_difference(got: LoraUpdate, wanted: Any) -> float:
    """Return the largest difference of two LoRA updates, as a part of the largest value of ``wanted``."""
    product, right = (update.up @ update.down * update.scaling for update in (got, wanted))
    off, size = (product - right).abs().max().item(), right.abs().max().item()
    return off / size if size else off


def _about(source: Source) -> dict[str, str | int]:
    manifest, identity = source.manifest, source.manifest.base
    about: dict[str, str | int] = {
        "general.name": manifest.full_name,
        "general.version": source.ref.rpartition("@")[2],
        "general.description": (
            f"LoRA for the language model of a {identity.model_type} base; the vision tower and the projector are not "
            "in it"
        ),
        "general.base_model.count": 1,
        "general.base_model.0.name": identity.hub_id or f"{identity.model_type} {identity.digest[:16]}",
        "finetune.manifest": f"sha256:{source.adapter.digest}",
        "finetune.base": f"sha256:{identity.digest}",
    }
    if identity.hub_id:
        about["general.base_model.0.repo_url"] = f"https://huggingface.co/{identity.hub_id}"
    if identity.revision:
        about["general.base_model.0.version"] = identity.revision
    if manifest.license:
        about["general.license"] = manifest.license
    return about


def _card(source: Source, lora: LoraFile) -> Card:
    sees = source.manifest.base.model_type in WITH_IMAGES
    images = (
        "For images it needs the base's own vision tower and projector as well, in a file that it calls mmproj."
        if sees
        else f"It is not known here to see images as a {source.manifest.base.model_type} base does: without that it "
        "reads text alone, whatever the adapter was trained to see in images."
    )
    return Card(
        version=source.version,
        digest=source.adapter.digest,
        library_name="gguf",
        loading=_LOADING.format(images=" --mmproj mmproj.gguf" if sees else ""),
        loading_language="bash",
        checks=(
            f"`{FILE_NAME}` holds the LoRA of the language model (architecture `{lora.architecture}`, alpha "
            f"{lora.alpha:g}) and nothing of the vision tower and the projector, which the adapter does not change. "
            "The base must be the one named above: llama.cpp compares no more than architecture and shapes. "
            f"{images} `export.json` lists what was compared before the folder was declared good; llama.cpp itself "
            "did not run."
        ),
    )
