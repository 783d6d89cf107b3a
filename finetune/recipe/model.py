"""Which base."""

from typing import Literal

from pydantic import model_validator

from finetune.recipe.section import Place, Section

AttnImplementation = Literal["auto", "eager", "sdpa", "flash_attention_2"]
Quantization = Literal["4bit", "8bit"]


class ModelSection(Section):
    """Which base, and how it is held in memory."""

    name_or_path: Place
    """``pocket``, a folder, or a hub id."""
    revision: str | None = None
    """Branch, tag or commit of a hub id."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """What the base is held in; the adapter trains in float32."""
    device: str = "auto"
    """``auto``, ``cpu``, ``cuda`` or ``mps``."""
    quantization: Quantization | None = None
    """Of the language tower, by bitsandbytes: ``4bit`` (NF4) or ``8bit`` (LLM.int8)."""
    attn_implementation: AttnImplementation = "auto"
    """How attention is computed, in transformers' words; auto: as transformers chooses."""

    @model_validator(mode="after")
    def _flash_attention_in_half_precision(self) -> "ModelSection":
        if self.attn_implementation == "flash_attention_2" and self.dtype == "float32":
            raise ValueError("attn_implementation: flash_attention_2 computes in 16 bit only; set dtype: bfloat16")
        return self
