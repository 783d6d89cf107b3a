"""LLaVA-OneVision."""

from finetune.families.image_text_to_text import ImageTextToTextFamily


class LlavaOnevisionFamily(ImageTextToTextFamily):
    """Siglip tower over tiles of any aspect ratio, two-layer projector, Qwen2."""

    model_type = "llava_onevision"
    tower_paths = {
        "language": ("model.language_model",),
        "projector": ("model.multi_modal_projector",),
        "vision": ("model.vision_tower",),
    }
