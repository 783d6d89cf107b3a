"""Section of the recipe for the base model."""

from typing import Literal

from pydantic import Field, model_validator

from finetune.recipe.section import Place, Section

AttnImplementation = Literal["auto", "eager", "sdpa", "flash_attention_2"]
Quantization = Literal["4bit", "8bit"]


class ModelSection(Section):
    """The base model, and the way it is held in memory."""

    name_or_path: Place = Field(examples=["Qwen/Qwen2.5-VL-3B-Instruct"])
    """``pocket``, a folder, or a hub id."""
    revision: str | None = Field(default=None, examples=["main"])
    """Branch, tag or commit of a hub id."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """The dtype of the base's weights; the adapter trains in float32."""
    device: str = Field(default="auto", examples=["cuda"])
    """The device: ``auto``, ``cpu``, ``cuda`` or ``mps``."""
    quantization: Quantization | None = None
    """Quantization of the language tower by bitsandbytes: ``4bit`` (NF4) or ``8bit`` (LLM.int8)."""
    attn_implementation: AttnImplementation = "auto"
    """Implementation of attention, by transformers' name; auto: the one that transformers chooses."""

    @model_validator(mode="after")
    def _flash_attention_in_half_precision(self) -> "ModelSection":
        if self.attn_implementation == "flash_attention_2" and self.dtype == "float32":
            raise ValueError(
                "attn_implementation flash_attention_2 needs 16 bit, got dtype float32. Set dtype: bfloat16"
            )
        return self
