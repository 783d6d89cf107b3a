"""The language model of a base in llama.cpp, and llama.cpp's file of a LoRA.

Sources, at https://github.com/ggml-org/llama.cpp: ``convert_lora_to_gguf.py`` and ``conversion/llama.py`` for writing,
``src/llama-adapter.cpp`` for reading.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch

from finetune.errors import ExportError

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from torch import Tensor
    from transformers import PreTrainedConfig

    from finetune.interfaces import Towers

Dtype = Literal["float32", "float16"]
Pair = tuple["Tensor", "Tensor"]  # A [r, I] and B [O, r]

# transformers' `model_type` of a language model -> llama.cpp's `general.architecture`
ARCHITECTURES = {
    "gemma3_text": "gemma3",
    "llama": "llama",
    "mistral": "llama",
    "qwen2": "qwen2",
    "qwen2_5_vl_text": "qwen2vl",
    "qwen2_vl_text": "qwen2vl",
    "qwen3": "qwen3",
    "qwen3_vl_text": "qwen3vl",
}
# `model_type` of a base whose language model llama.cpp supports, but not in this base -> why
_OTHERWISE = {
    "mistral3": "llama.cpp reads its language model as one of two architectures, depending on its release",
    "paligemma": "llama.cpp has no bidirectional attention over the prompt, which this base needs",
}
# Bases whose vision tower and projector llama.cpp reads from a file of their own (docs/multimodal.md there).
WITH_IMAGES = ("gemma3", "idefics3", "internvl", "llava", "qwen2_5_vl", "qwen2_vl", "qwen3_vl", "smolvlm")
_INSTEAD = "Export it with --to peft or --to merged."
_A, _B = ".lora_a", ".lora_b"


@dataclass(frozen=True, kw_only=True)
class Language:
    """The names and layout of a base's language model in llama.cpp.

    Attributes:
        architecture: its ``general.architecture``.
        num_layers: the number of layers of the decoder.
        num_heads: last part of a module's name -> number of heads in its rows, if llama.cpp orders them differently.
        paths: the paths of the language tower in the base.
    """

    architecture: str
    num_layers: int
    num_heads: Mapping[str, int]
    paths: tuple[str, ...]

    def weight_name(self, module: str) -> str:
        """Return llama.cpp's name for the weight of a module.

        Args:
            module: its full name in the base, such as ``model.language_model.layers.0.self_attn.q_proj``.

        Raises:
            ExportError: llama.cpp has no such weight.
        """
        names = _names(self.architecture, self.num_layers)
        inside = next((module.removeprefix(f"{path}.") for path in self.paths if module.startswith(f"{path}.")), module)
        if (name := names.get_name(f"model.{inside}")) is None:
            raise ExportError(
                f"{module}: llama.cpp's architecture {self.architecture!r} has no weight for this module. Train "
                "without it (method.towers.language)."
            )
        return f"{name}.weight"

    def to_llama_cpp(self, module: str, rows: Tensor) -> Tensor:
        """Return the rows [O, ...] of a module's weight, or of the B of its LoRA, in llama.cpp's order.

        transformers rotates the two halves of a head against each other, and llama.cpp's ``llama`` neighbouring rows.
        So each head's halves are interleaved there.
        """
        if (heads := self.num_heads.get(module.rpartition(".")[2])) is None:
            return rows
        return rows.unflatten(0, (heads, 2, -1)).transpose(1, 2).flatten(0, 2)

    def from_llama_cpp(self, module: str, rows: Tensor) -> Tensor:
        """Return rows [O, ...] in the order of transformers, from that of llama.cpp."""
        if (heads := self.num_heads.get(module.rpartition(".")[2])) is None:
            return rows
        return rows.unflatten(0, (heads, -1, 2)).transpose(1, 2).flatten(0, 2)


@dataclass(frozen=True, kw_only=True)
class LoraFile:
    """The contents of a file that llama.cpp loads with ``--lora``.

    Attributes:
        architecture: the architecture of the language model that it is for.
        alpha: the alpha of all weights; each one's product is multiplied by ``alpha / r``.
        pairs: name of a weight -> A [r, I] and B [O, r], in llama.cpp's order.
    """

    architecture: str
    alpha: float
    pairs: Mapping[str, Pair]


def refuse_model_type(model_type: str) -> None:
    """Check that llama.cpp computes the language model of such a base as the base does.

    Raises:
        ExportError: llama.cpp computes it differently.
    """
    if (reason := _OTHERWISE.get(model_type)) is not None:
        raise ExportError(f"a LoRA for a {model_type} base cannot be written as GGUF: {reason}. {_INSTEAD}")


def language_of(config: PreTrainedConfig, towers: Towers) -> Language:
    """Return the language model of a base.

    Raises:
        ExportError: llama.cpp does not support it, or computes it differently.
    """
    text: Any = config.get_text_config()
    refuse_model_type(config.model_type)
    if (architecture := ARCHITECTURES.get(text.model_type)) is None:
        raise ExportError(
            f"a LoRA for a {config.model_type} base cannot be written as GGUF: its language model must be one of "
            f"{', '.join(sorted(ARCHITECTURES))}, got {text.model_type!r}. {_INSTEAD}"
        )
    if "language" not in towers:
        raise ExportError(
            f"llama.cpp adapts only a language tower, and a {config.model_type} base has none. {_INSTEAD}"
        )
    heads = {"q_proj": text.num_attention_heads, "k_proj": text.num_key_value_heads or text.num_attention_heads}
    return Language(
        architecture=architecture,
        num_layers=text.num_hidden_layers,
        num_heads=heads if architecture == "llama" else {},
        paths=towers["language"],
    )


def write_lora(path: Path, lora: LoraFile, *, dtype: Dtype, about: Mapping[str, str | int]) -> None:
    """Write a LoRA for llama.cpp.

    Args:
        path: the path of the file.
        lora: its contents.
        dtype: the dtype of its tensors.
        about: additional metadata, such as ``general.name``.

    Raises:
        ExportError: a value is too large for ``dtype``.
    """
    import gguf

    writer = gguf.GGUFWriter(path, lora.architecture)
    half = dtype == "float16"
    try:
        writer.add_type(gguf.GGUFType.ADAPTER)
        writer.add_string(gguf.Keys.Adapter.TYPE, "lora")
        writer.add_float32(gguf.Keys.Adapter.LORA_ALPHA, lora.alpha)
        writer.add_file_type(gguf.LlamaFileType.MOSTLY_F16 if half else gguf.LlamaFileType.ALL_F32)
        for key, value in about.items():
            if isinstance(value, str):
                writer.add_string(key, value)
            else:
                writer.add_uint32(key, value)
        for name, pair in lora.pairs.items():
            for suffix, tensor in zip((_A, _B), pair, strict=True):
                writer.add_tensor(name + suffix, rounded(tensor, dtype, name=name + suffix).numpy())
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
    finally:
        writer.close()


def rounded(tensor: Tensor, dtype: Dtype, *, name: str) -> Tensor:
    """Return a tensor as a file of ``dtype`` holds it, on the CPU.

    Raises:
        ExportError: a value is too large for ``dtype``.
    """
    held = tensor.to("cpu", getattr(torch, dtype)).contiguous()
    if not held.isfinite().all():
        raise ExportError(f"{name}: a value of {tensor.abs().max():.4g} is too large for {dtype}. Leave out --dtype.")
    return held


def read_lora(path: Path) -> LoraFile:
    """Read a file as llama.cpp does, with the checks that llama.cpp makes before it uses the model.

    Raises:
        ExportError: llama.cpp would not load it.
    """
    import gguf

    reader = gguf.GGUFReader(path)
    fields = {name: field.contents() for name, field in reader.fields.items()}
    for key, wanted in (("general.type", "adapter"), ("adapter.type", "lora")):
        if (found := fields.get(key)) != wanted:
            raise ExportError(f"{path}: {key} must be {wanted!r} for llama.cpp, got {found!r}")
    tensors = {tensor.name: torch.from_numpy(np.array(tensor.data)) for tensor in reader.tensors}
    weights = {name.removesuffix(_A).removesuffix(_B) for name in tensors}
    if lone := sorted({w + end for w in weights for end in (_A, _B)} ^ set(tensors)):
        raise ExportError(f"{path}: each weight must have one {_A} and one {_B}, but {lone[0]} is missing or alone")
    pairs = {weight: (tensors[weight + _A], tensors[weight + _B]) for weight in sorted(weights)}
    for weight, (down, up) in pairs.items():
        if down.ndim != 2 or up.ndim != 2 or down.shape[0] != up.shape[1]:
            raise ExportError(
                f"{path}: {weight} must have A [r, I] and B [O, r], got {list(down.shape)} and {list(up.shape)}"
            )
    return LoraFile(architecture=fields["general.architecture"], alpha=fields["adapter.lora.alpha"], pairs=pairs)


@cache
def _names(architecture: str, num_layers: int) -> Any:
    """Return llama.cpp's names of weights by those of transformers, as ``model.layers.0.mlp.up_proj``."""
    import gguf

    key = next(key for key, name in gguf.MODEL_ARCH_NAMES.items() if name == architecture)
    return gguf.get_tensor_name_map(key, num_layers)
