"""InternVL 3 as transformers has it."""

from finetune.families.image_text_to_text import ImageTextToTextFamily


class InternVlFamily(ImageTextToTextFamily):
    """InternViT tower over tiles, pixel-shuffle projector, Qwen2 or another decoder."""

    model_type = "internvl"
    tower_paths = {
        "language": ("model.language_model",),
        "projector": ("model.multi_modal_projector",),
        "vision": ("model.vision_tower",),
    }
