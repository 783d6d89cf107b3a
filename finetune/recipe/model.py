"""Which base."""

from typing import Literal

from finetune.recipe.section import Section

Quantization = Literal["4bit", "8bit"]


class ModelSection(Section):
    """Which base, and how it is held in memory."""

    name_or_path: str
    """``pocket``, a folder, or a hub id."""
    revision: str | None = None
    """Branch, tag or commit of a hub id."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """What the base is held in; the adapter trains in float32."""
    device: str = "auto"
    """``auto``, ``cpu``, ``cuda`` or ``mps``."""
    quantization: Quantization | None = None
    """Of the language tower, by bitsandbytes: ``4bit`` (NF4) or ``8bit`` (LLM.int8)."""
