"""Load a base, attach PEFT's LoRA to its language model, and make the batch of the first step: BASE ROWS BATCH_SIZE."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch
from accelerate import Accelerator
from peft import LoraConfig, get_peft_model
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor

_LINEARS = r".*(language_model|text_model).*\.(q_proj|k_proj|v_proj|o_proj|gate_proj|up_proj|down_proj)"

if __name__ == "__main__":
    base, rows, batch_size = sys.argv[1], Path(sys.argv[2]), int(sys.argv[3])
    accelerator = Accelerator(cpu=True)
    processor = AutoProcessor.from_pretrained(base)
    model = AutoModelForImageTextToText.from_pretrained(base, dtype=torch.float32)
    model = get_peft_model(model, LoraConfig(r=8, lora_alpha=16, target_modules=_LINEARS))
    model = accelerator.prepare(model)
    texts, images = [], []
    for row in map(json.loads, rows.read_text(encoding="utf-8").splitlines()[:batch_size]):
        content = [{"type": "image"}, {"type": "text", "text": row["question"]}]
        answer = {"role": "assistant", "content": [{"type": "text", "text": row["answer"]}]}
        texts.append(processor.apply_chat_template([{"role": "user", "content": content}, answer]))
        images.append([Image.open(rows.parent / row["image"]).convert("RGB")])
    processor(text=texts, images=images, padding=True, return_tensors="pt")
    model.print_trainable_parameters()
    print("ready", flush=True)
