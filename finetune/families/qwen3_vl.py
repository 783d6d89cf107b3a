"""Qwen3-VL."""

from finetune.families.image_text_to_text import ImageTextToTextFamily


class Qwen3VlFamily(ImageTextToTextFamily):
    """Tower of any resolution, patch merger and deepstack mergers, decoder with multimodal rotary positions."""

    model_type = "qwen3_vl"
    tower_paths = {
        "language": ("model.language_model",),
        "projector": (
            "model.visual.merger",
            "model.visual.deepstack_merger_list",
        ),
        "vision": (
            "model.visual.patch_embed",
            "model.visual.pos_embed",
            "model.visual.blocks",
        ),
    }
