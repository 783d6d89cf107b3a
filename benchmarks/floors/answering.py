"""A base that answers questions about images, by transformers alone."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from transformers import AutoModelForImageTextToText, AutoProcessor

if TYPE_CHECKING:
    from PIL import Image


class Answering:
    """A base, loaded in float32.

    Args:
        path: the folder of the base.
    """

    def __init__(self, path: str):
        self.processor = AutoProcessor.from_pretrained(path)
        self.model = AutoModelForImageTextToText.from_pretrained(path, dtype=torch.float32)

    def answer(self, image: Image.Image, question: str, *, num_tokens: int) -> str:
        """Return the answer to a question about an image, by greedy generation."""
        content = [{"type": "image"}, {"type": "text", "text": question}]
        prompt = self.processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)
        inputs = self.processor(text=[prompt], images=[[image.convert("RGB")]], return_tensors="pt")
        with torch.inference_mode():
            tokens = self.model.generate(**inputs, max_new_tokens=num_tokens, do_sample=False)
        answer: str = self.processor.decode(tokens[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
        return answer
