"""LLaVA 1.5."""

from finetune.families.image_text_to_text import ImageTextToTextFamily


class LlavaFamily(ImageTextToTextFamily):
    """CLIP tower read one layer before its last, two-layer projector, Llama or another decoder."""

    model_type = "llava"
    tower_paths = {
        "language": ("model.language_model",),
        "projector": ("model.multi_modal_projector",),
        "vision": ("model.vision_tower",),
    }
