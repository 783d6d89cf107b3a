"""The floor: the trainable part alone. Features and tokens are ready in memory, and the head runs at supervised tokens.

LoRA's layers are ours too, so a run on stored features differs from this only by the store, the collator and the loop.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from peft.tuners.lora import LoraLayer
from torch.nn.functional import cross_entropy
from transformers.modeling_outputs import BaseModelOutputWithPooling

from benchmarks.contestants.parts import base_and_batches, peft_model, trainable
from finetune.methods.lora_forward import fold_additions

if TYPE_CHECKING:
    from torch import Tensor, nn

    from benchmarks.contestants import Job
    from benchmarks.gate import Gate

_PIXELS = ("pixel_values", "pixel_attention_mask")  # what features stand for
_OF_IMAGES = (*_PIXELS, "image_grid_thw")  # what features are made of


def run(job: Job, gate: Gate) -> None:
    """Train on ready features."""
    base, batches = base_and_batches(job)
    ready = []
    for batch in batches:
        supervised = batch.labels[:, 1:] != -100  # [B, T - 1]
        features = _features(base.model, batch.inputs)
        inputs = {name: tensor for name, tensor in batch.inputs.items() if name not in _PIXELS}
        ready.append((inputs, features, supervised.nonzero(as_tuple=True), batch.labels[:, 1:][supervised]))
    del batches
    model = peft_model(job, base.model)
    for layer in model.modules():
        if isinstance(layer, LoraLayer):
            fold_additions(layer)
    parameters = trainable(model)
    optimizer = torch.optim.AdamW(parameters, lr=job.learning_rate, weight_decay=0.0, fused=True)
    body, head = base.model.model, base.model.get_output_embeddings()
    gate.ready(model)
    for inputs, features, (rows, places), targets in ready:
        image = BaseModelOutputWithPooling(pooler_output=features)
        hidden = body(**inputs, mm_encoder_outputs={"image": image}, use_cache=False).last_hidden_state  # [B, T, D]
        loss = cross_entropy(head(hidden[rows, places]).float(), targets)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, job.max_grad_norm)
        optimizer.step()
        optimizer.zero_grad()
        gate.step(loss.detach(), len(targets))


@torch.no_grad()
def _features(model: nn.Module, inputs: dict[str, Tensor]) -> Tensor | tuple[Tensor, ...]:
    """Return the outputs of vision tower and projector for a batch's images."""
    given = {name: inputs[name] for name in _OF_IMAGES if name in inputs}
    return model.model.get_image_features(**given, return_dict=True).pooler_output
