"""CLIP (Radford et al., https://arxiv.org/abs/2103.00020)."""

from finetune.families.dual_encoder import DualEncoderFamily


class ClipFamily(DualEncoderFamily):
    """Vision and text transformer, each with a linear projection into the space that both share."""

    model_type = "clip"
    tower_paths = {
        "language": ("text_model",),
        "projector": ("visual_projection", "text_projection"),
        "vision": ("vision_model",),
    }
