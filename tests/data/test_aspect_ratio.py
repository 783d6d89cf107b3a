"""Thin images: refused where the processor of a base would make a long strip of them."""

from types import SimpleNamespace

import numpy as np
import pytest
from transformers import CLIPImageProcessor, Qwen2VLImageProcessor, ViTImageProcessor

from finetune.assemble.loading import load_base
from finetune.core.example import as_images
from finetune.data.aspect_ratio import MOST_ASPECT, MOST_RESIZED_PIXELS, most_aspect, refuse_aspect
from finetune.errors import RowError
from finetune.serving.vision_language_model import VisionLanguageModel


@pytest.mark.parametrize(
    "image_processor, most",
    [
        (CLIPImageProcessor(size={"shortest_edge": 336}), MOST_RESIZED_PIXELS // 336**2),
        (CLIPImageProcessor(size={"shortest_edge": 224}), 79),
        (CLIPImageProcessor(size={"shortest_edge": 8}), MOST_ASPECT),
        (CLIPImageProcessor(size={"shortest_edge": 4000}), 1),
        (ViTImageProcessor(size={"height": 224, "width": 224}), MOST_ASPECT),
        (Qwen2VLImageProcessor(), MOST_ASPECT),
    ],
)
def test_how_long_an_image_may_be(image_processor, most):
    assert most_aspect(SimpleNamespace(image_processor=image_processor)) == most


@pytest.mark.parametrize("edge", [224, 336])
def test_what_is_let_through_is_resized_to_few_pixels(edge):
    processor = CLIPImageProcessor(size={"shortest_edge": edge}, do_center_crop=False)
    most = most_aspect(SimpleNamespace(image_processor=processor))
    pixels = processor(np.zeros((2, 2 * most, 3), np.uint8), return_tensors="np")["pixel_values"]
    assert MOST_RESIZED_PIXELS * 0.95 < pixels.shape[2] * pixels.shape[3] <= MOST_RESIZED_PIXELS


def test_the_error_names_sizes_and_bound():
    refuse_aspect((50, 1), "x", 50)
    with pytest.raises(
        RowError,
        match="x: the longer side of an image must be at most 50 times as long as the shorter side, got 1 x 51",
    ):
        refuse_aspect((1, 51), "x", 50)


def test_an_app_gets_a_warning(tiny_clip):
    vlm = VisionLanguageModel(load_base(str(tiny_clip), device="cpu"))
    vlm.base.processor.image_processor.size = {"shortest_edge": 336}
    with pytest.raises(RowError, match="must be at most 35 times as long as the shorter side, got 1 x 60"):
        vlm.classify(np.zeros((60, 1, 3), np.uint8), ["a"])


def test_a_training_row_is_reported_before_the_first_step(tiny_clip, tmp_path):
    from PIL import Image

    from finetune.core.example import Example, answer, show
    from finetune.data.bad_rows import BadRows
    from finetune.data.lengths import fitting

    base = load_base(str(tiny_clip), device="cpu")
    base.processor.image_processor.size = {"shortest_edge": 336}
    Image.new("RGB", (60, 1)).save(tmp_path / "thin.png")
    row = Example(id="7", messages=[*show(), answer("a")], media=as_images([tmp_path / "thin.png"]), answers=["a"])
    section, bad = SimpleNamespace(too_long="error"), BadRows("rows", on_error="error", log=print)
    with pytest.raises(RowError, match="row 7: its image: the longer side .* at most 35 times .*, got 60 x 1"):
        fitting([row], base.lengths(base.default_task), section, "train", limit=None, room=0, bad=bad)
