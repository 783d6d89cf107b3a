"""Which base."""

from typing import Literal

from finetune.recipe.section import Section

Quantization = Literal["4bit", "8bit"]


class ModelSection(Section):
    """Which base, and how it is held in memory."""

    name_or_path: str  # "pocket", a folder, or a hub id
    revision: str | None = None
    dtype: Literal["float32", "bfloat16"] = "float32"  # of the base; the adapter trains in float32
    device: str = "auto"  # "auto", "cpu", "cuda", "mps"
    quantization: Quantization | None = None  # of the language tower, by bitsandbytes
