"""The bare loop: PEFT's model, batches that are ready in memory, forward, backward, step."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from benchmarks.contestants.parts import base_and_batches, peft_model, trainable

if TYPE_CHECKING:
    from benchmarks.contestants import Job
    from benchmarks.gate import Gate


def run(job: Job, gate: Gate) -> None:
    """Train on the loss that the model itself computes."""
    base, batches = base_and_batches(job)
    # As transformers gives it: our own computes linear modules otherwise on some CPUs.
    plain = type(base.model).from_pretrained(base.path, dtype=base.model.dtype).to(base.model.device)
    del base
    model = peft_model(job, plain)
    parameters = trainable(model)
    optimizer = torch.optim.AdamW(parameters, lr=job.learning_rate, weight_decay=0.0)
    gate.ready(model)
    for batch in batches:
        loss = model(**batch.inputs, labels=batch.labels, use_cache=False).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, job.max_grad_norm)
        optimizer.step()
        optimizer.zero_grad()
        gate.step(loss.detach(), (batch.labels[:, 1:] != -100).sum())
