"""Idefics3 (the class of SmolVLM's first release, and of the embedded pocket model)."""

from finetune.families.image_text_to_text import ImageTextToTextFamily


class Idefics3Family(ImageTextToTextFamily):
    """Siglip tower, pixel-shuffle connector, Llama."""

    model_type = "idefics3"
    tower_paths = {
        "language": ("model.text_model",),
        "projector": ("model.connector",),
        "vision": ("model.vision_model",),
    }
