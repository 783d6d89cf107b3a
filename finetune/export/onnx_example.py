"""Classification of an image by labels, and embeddings for search, by onnxruntime.

    python classify.py IMAGE LABEL LABEL ...

This file belongs beside ``image.onnx`` and ``text.onnx``, and needs numpy, onnxruntime, pillow and tokenizers.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import onnxruntime
from PIL import Image, ImageOps
from tokenizers import Tokenizer

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray

SETTINGS_NAME = "classify.json"


class Classifier:
    """Both towers of the model; shapes: N images or texts, T tokens, D values of an embedding.

    Args:
        folder: the folder that holds this file.
        providers: the execution providers of onnxruntime, such as ``CUDAExecutionProvider``.
    """

    def __init__(self, folder: str | Path, *, providers: Sequence[str] = ("CPUExecutionProvider",)):
        folder = Path(folder)
        self.settings = json.loads((folder / SETTINGS_NAME).read_text("utf-8"))
        self.preprocessing = json.loads((folder / "processor_config.json").read_text("utf-8"))["image_processor"]
        self.tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
        self.tokenizer.no_padding()
        self.tokenizer.no_truncation()
        self.image = onnxruntime.InferenceSession(folder / "image.onnx", providers=list(providers))
        self.text = onnxruntime.InferenceSession(folder / "text.onnx", providers=list(providers))

    def classify(self, image: str | Path | Image.Image, labels: Sequence[str]) -> dict[str, float]:
        """Return the probability of each label in the text template, given that one of them is right."""
        texts = [self.settings["text_template"].replace("{label}", label) for label in labels]
        cosines = self.embed_texts(texts) @ self.embed_images([image])[0]  # [labels]
        weights = np.exp(self.settings["logit_scale"] * (cosines - cosines.max()))
        return dict(zip(labels, (weights / weights.sum()).tolist(), strict=True))

    def embed_images(self, images: Sequence[str | Path | Image.Image]) -> NDArray[np.float32]:
        """Return embeddings [N, D] of length 1."""
        return self.image.run(None, {"pixel_values": np.stack([self.pixels(image) for image in images])})[0]

    def embed_texts(self, texts: Sequence[str]) -> NDArray[np.float32]:
        """Return embeddings [N, D] of length 1, of texts without the text template."""
        ids, mask = self.tokens(texts)
        return self.text.run(None, {"input_ids": ids, "attention_mask": mask})[0]

    def tokens(self, texts: Sequence[str]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Return the token ids of texts and their attention mask, 0 for padding, each [N, T]."""
        rows = [self.tokenizer.encode(text).ids for text in texts]
        longest, most = max(map(len, rows)), self.settings["max_tokens"]
        if longest > most:
            raise ValueError(f"a text may have at most {most} tokens, got {longest}. Shorten it.")
        ids = np.full((len(rows), longest), self.settings["pad_token_id"], np.int64)
        mask = np.zeros_like(ids)
        for row, tokens in enumerate(rows):
            ids[row, : len(tokens)], mask[row, : len(tokens)] = tokens, 1
        return ids, mask

    def pixels(self, image: str | Path | Image.Image) -> NDArray[np.float32]:
        """Return the pixels [3, H, W] of an image for the image tower."""
        how = self.preprocessing
        if not isinstance(image, Image.Image):
            image = Image.open(image)
        image = _upright_rgb(image)
        if how["do_resize"]:
            image = image.resize(_new_size(image, how["size"]), resample=how["resample"])
        if how["do_center_crop"]:
            height, width = how["crop_size"]["height"], how["crop_size"]["width"]
            left, top = (image.width - width) // 2, (image.height - height) // 2
            image = image.crop((left, top, left + width, top + height))
        values: Any = np.asarray(image, np.float32)  # [H, W, 3]
        if how["do_rescale"]:
            values = values * np.float32(how["rescale_factor"])
        if how["do_normalize"]:
            values = (values - np.array(how["image_mean"], np.float32)) / np.array(how["image_std"], np.float32)
        return values.transpose(2, 0, 1)


def _new_size(image: Image.Image, size: dict[str, Any]) -> tuple[int, int]:
    """Return the new width and height."""
    if "shortest_edge" not in size:
        return size["width"], size["height"]
    short, long = sorted(image.size)
    other = int(size["shortest_edge"] * long / short)
    return (size["shortest_edge"], other) if image.width <= image.height else (other, size["shortest_edge"])


def _upright_rgb(image: Image.Image) -> Image.Image:
    """Return an image in RGB, upright and on a white background."""
    image = ImageOps.exif_transpose(image)
    if image.mode in ("I;16", "I;16B", "I;16L", "I;16N", "I"):  # 16 bits; pillow would clip the values at 255
        eight_bit = (np.asarray(image).astype(np.float64) / 257).round().clip(0, 255)
        image = Image.fromarray(eight_bit.astype(np.uint8))
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert("RGB")


if __name__ == "__main__":
    if len(sys.argv) < 3:
        sys.exit(f"usage: {sys.argv[0]} IMAGE LABEL LABEL ...")
    for label, probability in Classifier(Path(__file__).parent).classify(sys.argv[1], sys.argv[2:]).items():
        print(f"{probability:.3f}  {label}")
