"""LLaVA-OneVision."""

from finetune.families.image_text_to_text import ImageTextToTextFamily
from finetune.interfaces import Towers


class LlavaOnevisionFamily(ImageTextToTextFamily):
    """Siglip tower over tiles of any aspect ratio, two-layer projector, Qwen2."""

    model_type = "llava_onevision"
    tower_paths = Towers(
        language=("model.language_model",),
        projector=("model.multi_modal_projector",),
        vision=("model.vision_tower",),
    )
