"""SmolVLM (versions 1 and 2)."""

from finetune.families.image_text_to_text import ImageTextToTextFamily


class SmolVlmFamily(ImageTextToTextFamily):
    """Siglip-like tower, pixel-shuffle connector, Llama."""

    model_type = "smolvlm"
    tower_paths = {
        "language": ("model.text_model",),
        "projector": ("model.connector",),
        "vision": ("model.vision_model",),
    }
