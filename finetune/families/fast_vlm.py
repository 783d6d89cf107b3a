"""FastVLM: any convolutional tower, a two-layer projector, Qwen2."""

from finetune.families.image_text_to_text import ImageTextToTextFamily


class FastVlmFamily(ImageTextToTextFamily):
    """Convolutional tower (FastViT, MobileNet), MLP projector, Qwen2."""

    model_type = "fast_vlm"
    tower_paths = {
        "language": ("model.language_model",),
        "projector": ("model.multi_modal_projector",),
        "vision": ("model.vision_tower",),
    }
