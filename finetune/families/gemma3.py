"""Gemma 3."""

from finetune.families.image_text_to_text import ImageTextToTextFamily


class Gemma3Family(ImageTextToTextFamily):
    """Siglip tower, average-pooling projector, decoder that sees the tokens of an image in both directions."""

    model_type = "gemma3"
    tower_paths = {
        "language": ("model.language_model",),
        "projector": ("model.multi_modal_projector",),
        "vision": ("model.vision_tower",),
    }
