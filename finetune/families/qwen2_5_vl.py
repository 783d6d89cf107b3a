"""Qwen2.5-VL."""

from finetune.families.image_text_to_text import ImageTextToTextFamily


class Qwen25VlFamily(ImageTextToTextFamily):
    """Tower of any resolution with windowed attention, patch merger, decoder with multimodal rotary positions."""

    model_type = "qwen2_5_vl"
    tower_paths = {
        "language": ("model.language_model",),
        "projector": ("model.visual.merger",),
        "vision": (
            "model.visual.patch_embed",
            "model.visual.blocks",
        ),
    }
