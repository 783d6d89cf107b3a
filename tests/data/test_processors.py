"""Processors of other classes than the default tests' bases: spans and lengths hold for what each makes of an image.

They put other tokens around an image, cut it into tiles, or count by its size; no model is needed to see that.
"""

import numpy as np
import pytest
from transformers import (
    Gemma3ImageProcessor,
    Gemma3Processor,
    LlavaOnevisionImageProcessor,
    LlavaOnevisionProcessor,
    LlavaOnevisionVideoProcessor,
    PaliGemmaProcessor,
    Qwen2_5_VLProcessor,
    Qwen2VLImageProcessor,
    Qwen2VLVideoProcessor,
    SiglipImageProcessor,
    SmolVLMImageProcessor,
    SmolVLMProcessor,
    SmolVLMVideoProcessor,
)

from finetune.core.example import Example, as_images
from finetune.data.collate import Collator
from finetune.data.lengths import Lengths
from finetune.families.image_text_to_text import ImageTextToTextFamily
from finetune.pocket.blueprint import CHAT_TEMPLATE, build_tokenizer
from tests.data.test_collate import SUPERVISED, TURNS, ids, runs

SIZES = [(60, 44), (300, 90)]


def with_tokens(*extra):
    tokenizer = build_tokenizer(["What color is it? red", "yes no, how many are there?"])
    tokenizer.add_tokens(list(extra), special_tokens=True)
    return tokenizer


def named(tokenizer, **tokens):
    """Give a tokenizer the special tokens that a processor asks it for by name."""
    tokenizer.add_tokens(list(tokens.values()), special_tokens=True)
    for name, token in tokens.items():
        setattr(tokenizer, name, token)
        setattr(tokenizer, f"{name}_id", tokenizer.convert_tokens_to_ids(token))
    return tokenizer


def qwen():
    tokens = ["<|vision_start|>", "<|image_pad|>", "<|vision_end|>", "<|video_pad|>"]
    template = CHAT_TEMPLATE.replace("<image>", "<|vision_start|><|image_pad|><|vision_end|>")
    images = Qwen2VLImageProcessor(patch_size=4, min_pixels=64, max_pixels=4096)
    return Qwen2_5_VLProcessor(images, with_tokens(*tokens), Qwen2VLVideoProcessor(), chat_template=template), False


def smolvlm():
    tokens = ["<fake_token_around_image>", "<global-img>", "<end_of_utterance>"]
    tokens += [f"<row_{i}_col_{j}>" for i in range(1, 7) for j in range(1, 7)]
    images = SmolVLMImageProcessor(size={"longest_edge": 128}, max_image_size={"longest_edge": 32})
    video = SmolVLMVideoProcessor(size={"longest_edge": 32})
    return SmolVLMProcessor(images, with_tokens(*tokens), video, image_seq_len=4, chat_template=CHAT_TEMPLATE), True


def gemma3():
    tokens = {"boi_token": "<start_of_image>", "eoi_token": "<end_of_image>", "image_token": "<image_soft_token>"}
    tokenizer = named(with_tokens(), **tokens)
    template = CHAT_TEMPLATE.replace("<image>", "<start_of_image>")
    images = Gemma3ImageProcessor(size={"height": 32, "width": 32})
    return Gemma3Processor(images, tokenizer, chat_template=template, image_seq_length=9), True


def llava_onevision():
    images = LlavaOnevisionImageProcessor(size={"height": 32, "width": 32}, image_grid_pinpoints=[[32, 64], [64, 32]])
    processor = LlavaOnevisionProcessor(
        images,
        with_tokens("<video>"),
        LlavaOnevisionVideoProcessor(),
        num_image_tokens=16,
        vision_feature_select_strategy="full",
        chat_template=CHAT_TEMPLATE,
    )
    return processor, False


def paligemma():
    tokenizer = named(with_tokens("<bos>"), image_token="<image>")
    tokenizer.bos_token = "<bos>"
    images = SiglipImageProcessor(size={"height": 32, "width": 32})
    images.image_seq_length = 7
    return PaliGemmaProcessor(images, tokenizer, chat_template=CHAT_TEMPLATE), True


MAKERS = [qwen, smolvlm, gemma3, llava_onevision, paligemma]


@pytest.fixture(scope="module", params=MAKERS, ids=lambda make: make.__name__)
def collator(request):
    processor, per_row = request.param()
    family = type("Family", (ImageTextToTextFamily,), {"images_per_row": per_row})()
    return Collator(family, processor, [1])


def conversation():
    images = [np.full((height, width, 3), 90, np.uint8) for width, height in SIZES]
    return Example(id="talk", messages=TURNS, media=as_images(images), answers=["two"])


@pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")  # in PaliGemma's own processor
def test_spans_and_lengths(collator):
    row = conversation()
    batch = collator.training_batch([row])
    assert runs(batch.labels[0]) == [ids(collator, words) for words in SUPERVISED]
    assert Lengths(collator, key="k").of_training_row(row, SIZES).row == batch.inputs["input_ids"].shape[1]


def test_a_row_without_images_beside_one_with_two(collator):
    if isinstance(collator.processor, PaliGemmaProcessor):
        pytest.skip("this processor refuses rows without images")
    without = Example(id="text", messages=[*TURNS[:1], *TURNS[3:5]], media=(), answers=["yes, it is"])
    batch = collator.training_batch([without, conversation()])
    assert runs(batch.labels[0]) == [ids(collator, SUPERVISED[1])]
    assert runs(batch.labels[1]) == [ids(collator, words) for words in SUPERVISED]
