"""Tiny random models of the real classes, with their real processor classes, saved as the hub lays them out."""

from pathlib import Path

import torch
from transformers import (
    CLIPConfig,
    CLIPImageProcessor,
    CLIPModel,
    CLIPProcessor,
    FastVlmConfig,
    FastVlmForConditionalGeneration,
    Gemma3Config,
    Gemma3ForConditionalGeneration,
    Gemma3ImageProcessor,
    Gemma3Processor,
    GotOcr2ImageProcessor,
    Idefics3Config,
    Idefics3ForConditionalGeneration,
    Idefics3ImageProcessor,
    Idefics3Processor,
    InternVLConfig,
    InternVLForConditionalGeneration,
    InternVLProcessor,
    InternVLVideoProcessor,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaOnevisionConfig,
    LlavaOnevisionForConditionalGeneration,
    LlavaOnevisionImageProcessor,
    LlavaOnevisionProcessor,
    LlavaOnevisionVideoProcessor,
    LlavaProcessor,
    MobileNetV2Config,
    PaliGemmaConfig,
    PaliGemmaForConditionalGeneration,
    PaliGemmaProcessor,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2_5_VLProcessor,
    Qwen2Config,
    Qwen2VLImageProcessor,
    Qwen2VLVideoProcessor,
    Qwen3VLConfig,
    Qwen3VLForConditionalGeneration,
    Qwen3VLProcessor,
    Qwen3VLVideoProcessor,
    SiglipImageProcessor,
    SmolVLMConfig,
    SmolVLMForConditionalGeneration,
    SmolVLMImageProcessor,
    SmolVLMProcessor,
    SmolVLMVideoProcessor,
    ViTImageProcessor,
)

from tests.tiny.parts import SIDE, clip_tokenizer, save, template, text, tokenizer, vision

_IDEFICS_TOKENS = ("<fake_token_around_image>", "<global-img>", "<end_of_utterance>")
_QWEN_TOKENS = ("<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>")
_QWEN_IMAGE = "<|vision_start|><|image_pad|><|vision_end|>"
_ROPE = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [4, 6, 6]}  # of a head of 32


def save_idefics3(folder: Path, *, seed: int = 0) -> Path:
    """Idefics3 with 4 image tokens an image."""
    tokens = tokenizer(*_IDEFICS_TOKENS)
    torch.manual_seed(seed)
    config = Idefics3Config(
        image_token_id=tokens.get_vocab()["<image>"],
        scale_factor=2,
        vision_config=vision(),
        text_config={"model_type": "llama", **text(tokens)},
    )
    images = Idefics3ImageProcessor(
        do_image_splitting=False, size={"longest_edge": SIDE}, max_image_size={"longest_edge": SIDE}
    )
    processor = Idefics3Processor(images, tokens, image_seq_len=4, chat_template=template("<image>"))
    return save(Idefics3ForConditionalGeneration(config), processor, folder)


def save_smolvlm(folder: Path, *, seed: int = 0) -> Path:
    """SmolVLM with 4 image tokens an image."""
    tokens = tokenizer(*_IDEFICS_TOKENS, "<video>")
    torch.manual_seed(seed)
    config = SmolVLMConfig(
        image_token_id=tokens.get_vocab()["<image>"],
        scale_factor=2,
        vision_config=vision(),
        text_config={"model_type": "llama", **text(tokens)},
    )
    sizes = {"size": {"longest_edge": SIDE}, "max_image_size": {"longest_edge": SIDE}}
    processor = SmolVLMProcessor(
        SmolVLMImageProcessor(do_image_splitting=False, **sizes),
        tokens,
        SmolVLMVideoProcessor(**sizes),
        image_seq_len=4,
        chat_template=template("<image>"),
    )
    return save(SmolVLMForConditionalGeneration(config), processor, folder)


def save_fast_vlm(folder: Path, *, seed: int = 0) -> Path:
    """FastVLM on a MobileNetV2, whose batch norms break when a frozen tower is put in training mode."""
    tokens = tokenizer()
    torch.manual_seed(seed)
    tower = MobileNetV2Config(depth_multiplier=0.35, image_size=SIDE, finegrained_output=True)
    tower.hidden_size = 1280
    config = FastVlmConfig(
        vision_config=tower,
        text_config=Qwen2Config(**text(tokens)),
        image_token_index=tokens.get_vocab()["<image>"],
        image_seq_length=1,
    )
    images = ViTImageProcessor(size={"height": SIDE, "width": SIDE}, image_mean=[0.5] * 3, image_std=[0.5] * 3)
    processor = LlavaProcessor(
        images,
        tokens,
        patch_size=32,
        vision_feature_select_strategy="full",
        image_token="<image>",
        chat_template=template("<image>"),
    )
    return save(FastVlmForConditionalGeneration(config), processor, folder)


def save_llava(folder: Path, *, seed: int = 0) -> Path:
    """LLaVA whose CLIP tower is read one layer before its last, as the real one's is."""
    tokens = tokenizer()
    torch.manual_seed(seed)
    config = LlavaConfig(
        vision_config={"model_type": "clip_vision_model", **vision(num_hidden_layers=3)},
        text_config={"model_type": "llama", **text(tokens)},
        image_token_index=tokens.get_vocab()["<image>"],
        image_seq_length=16,
    )
    images = ViTImageProcessor(size={"height": SIDE, "width": SIDE}, image_mean=[0.5] * 3, image_std=[0.5] * 3)
    processor = LlavaProcessor(
        images,
        tokens,
        patch_size=8,
        vision_feature_select_strategy="default",
        image_token="<image>",
        num_additional_image_tokens=1,
        chat_template=template("<image>"),
    )
    return save(LlavaForConditionalGeneration(config), processor, folder)


def save_llava_onevision(folder: Path, *, seed: int = 0) -> Path:
    """LLaVA-OneVision: the whole image and up to two tiles of it."""
    tokens = tokenizer("<video>")
    torch.manual_seed(seed)
    pinpoints = [[SIDE, SIDE], [SIDE, 2 * SIDE], [2 * SIDE, SIDE]]
    config = LlavaOnevisionConfig(
        vision_config={"model_type": "siglip_vision_model", "vision_use_head": False, **vision()},
        text_config={"model_type": "qwen2", **text(tokens)},
        image_token_index=tokens.get_vocab()["<image>"],
        video_token_index=tokens.get_vocab()["<video>"],
        image_grid_pinpoints=pinpoints,
    )
    size = {"height": SIDE, "width": SIDE}
    processor = LlavaOnevisionProcessor(
        LlavaOnevisionImageProcessor(size=size, image_grid_pinpoints=pinpoints),
        tokens,
        LlavaOnevisionVideoProcessor(size=size),
        num_image_tokens=16,
        vision_feature_select_strategy="full",
        chat_template=template("<image>"),
    )
    return save(LlavaOnevisionForConditionalGeneration(config), processor, folder)


def save_qwen2_5_vl(folder: Path, *, seed: int = 0) -> Path:
    """Qwen2.5-VL: images of any size, 3-D positions, one layer of windowed attention."""
    tokens = tokenizer(*_QWEN_TOKENS)
    ids = tokens.get_vocab()
    torch.manual_seed(seed)
    config = Qwen2_5_VLConfig(
        vision_config={
            "depth": 2,
            "hidden_size": 16,
            "intermediate_size": 32,
            "num_heads": 2,
            "patch_size": 8,
            "window_size": 32,
            "out_hidden_size": 64,
            "fullatt_block_indexes": [1],
        },
        text_config=text(tokens, rope_parameters=_ROPE),
        image_token_id=ids["<|image_pad|>"],
        video_token_id=ids["<|video_pad|>"],
        vision_start_token_id=ids["<|vision_start|>"],
        vision_end_token_id=ids["<|vision_end|>"],
    )
    sizes = {"patch_size": 8, "min_pixels": 16 * 16, "max_pixels": 48 * 48}
    processor = Qwen2_5_VLProcessor(
        Qwen2VLImageProcessor(**sizes), tokens, Qwen2VLVideoProcessor(**sizes), chat_template=template(_QWEN_IMAGE)
    )
    return save(Qwen2_5_VLForConditionalGeneration(config), processor, folder)


def save_qwen3_vl(folder: Path, *, seed: int = 0) -> Path:
    """Qwen3-VL with features of its first tower layer fed into the decoder (deepstack)."""
    tokens = tokenizer(*_QWEN_TOKENS)
    ids = tokens.get_vocab()
    torch.manual_seed(seed)
    config = Qwen3VLConfig(
        vision_config={
            "depth": 2,
            "hidden_size": 16,
            "intermediate_size": 32,
            "num_heads": 2,
            "patch_size": 8,
            "out_hidden_size": 64,
            "num_position_embeddings": 16,
            "deepstack_visual_indexes": [0],
        },
        text_config=text(tokens, head_dim=32, rope_parameters={**_ROPE, "mrope_interleaved": True}),
        image_token_id=ids["<|image_pad|>"],
        video_token_id=ids["<|video_pad|>"],
        vision_start_token_id=ids["<|vision_start|>"],
        vision_end_token_id=ids["<|vision_end|>"],
    )
    sizes = {"patch_size": 8, "size": {"shortest_edge": 16 * 16, "longest_edge": 48 * 48}}
    processor = Qwen3VLProcessor(
        Qwen2VLImageProcessor(**sizes), tokens, Qwen3VLVideoProcessor(**sizes), chat_template=template(_QWEN_IMAGE)
    )
    return save(Qwen3VLForConditionalGeneration(config), processor, folder)


def save_internvl(folder: Path, *, seed: int = 0) -> Path:
    """InternVL with 4 image tokens a tile."""
    tokens = tokenizer(
        start_image_token="<img>", end_image_token="</img>", context_image_token="<IMG_CONTEXT>", video_token="<video>"
    )
    torch.manual_seed(seed)
    config = InternVLConfig(
        vision_config=vision(image_size=[SIDE, SIDE], patch_size=[8, 8]),
        text_config={"model_type": "qwen2", **text(tokens)},
        image_token_id=tokens.get_vocab()["<IMG_CONTEXT>"],
        image_seq_length=4,
    )
    size = {"height": SIDE, "width": SIDE}
    processor = InternVLProcessor(
        GotOcr2ImageProcessor(size=size, max_patches=2),
        tokens,
        InternVLVideoProcessor(size=size),
        image_seq_length=4,
        chat_template=template("<IMG_CONTEXT>"),
    )
    return save(InternVLForConditionalGeneration(config), processor, folder)


def save_paligemma(folder: Path, *, seed: int = 0) -> Path:
    """PaliGemma 2: no chat template of its own, sliding-window layers, prompt seen in both directions."""
    tokens = tokenizer(bos_token="<bos>")
    tokens.bos_token = "<bos>"
    images = SiglipImageProcessor(size={"height": SIDE, "width": SIDE}, image_mean=[0.5] * 3, image_std=[0.5] * 3)
    images.image_seq_length = 16
    processor = PaliGemmaProcessor(images, tokens)
    torch.manual_seed(seed)
    config = PaliGemmaConfig(
        vision_config={"model_type": "siglip_vision_model", "vision_use_head": False, **vision()},
        text_config={"model_type": "gemma2", **text(tokens, head_dim=16, sliding_window=64)},
        image_token_index=processor.image_token_id,
        projection_dim=64,
        hidden_size=64,
    )
    return save(PaliGemmaForConditionalGeneration(config), processor, folder)


def save_gemma3(folder: Path, *, seed: int = 0) -> Path:
    """Gemma 3 with 4 image tokens an image that see each other in both directions."""
    tokens = tokenizer(boi_token="<start_of_image>", eoi_token="<end_of_image>", image_token="<image_soft_token>")
    ids = tokens.get_vocab()
    torch.manual_seed(seed)
    config = Gemma3Config(
        vision_config={"model_type": "siglip_vision_model", "vision_use_head": False, **vision()},
        text_config=text(tokens, head_dim=16, sliding_window=64, layer_types=["sliding_attention", "full_attention"]),
        mm_tokens_per_image=4,
        boi_token_index=ids["<start_of_image>"],
        eoi_token_index=ids["<end_of_image>"],
        image_token_index=ids["<image_soft_token>"],
    )
    processor = Gemma3Processor(
        Gemma3ImageProcessor(size={"height": SIDE, "width": SIDE}),
        tokens,
        chat_template=template("<start_of_image>"),
        image_seq_length=4,
    )
    return save(Gemma3ForConditionalGeneration(config), processor, folder)


def save_clip(folder: Path, *, seed: int = 0) -> Path:
    """CLIP: two towers of different widths, projected into one space of 32 values."""
    tokens = clip_tokenizer()
    torch.manual_seed(seed)
    config = CLIPConfig(
        vision_config=vision(),
        text_config=text(tokens, max_position_embeddings=64, pad_token_id=tokens.pad_token_id,
                         eos_token_id=tokens.eos_token_id, bos_token_id=tokens.bos_token_id),
        projection_dim=32,
    )  # fmt: skip
    images = CLIPImageProcessor(size={"shortest_edge": SIDE}, crop_size={"height": SIDE, "width": SIDE})
    return save(CLIPModel(config), CLIPProcessor(images, tokens), folder)


FAMILIES = {
    "clip": save_clip,
    "fast_vlm": save_fast_vlm,
    "gemma3": save_gemma3,
    "idefics3": save_idefics3,
    "internvl": save_internvl,
    "llava": save_llava,
    "llava_onevision": save_llava_onevision,
    "paligemma": save_paligemma,
    "qwen2_5_vl": save_qwen2_5_vl,
    "qwen3_vl": save_qwen3_vl,
    "smolvlm": save_smolvlm,
}
