"""trl's SFTTrainer with PEFT's LoRA, used as trl documents it for vision-language models.

https://huggingface.co/docs/trl/sft_trainer#training-vision-language-models: rows of prompt, completion and images,
which trl's own collator makes into batches, learning the completion; ``max_length=None``.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from datasets import Dataset, Image, List
from transformers import AutoModelForImageTextToText, AutoProcessor, TrainerCallback
from trl import SFTConfig, SFTTrainer

from benchmarks.contestants.parts import lora_config
from benchmarks.rows import read_rows

if TYPE_CHECKING:
    from torch import Tensor, nn

    from benchmarks.contestants import Job
    from benchmarks.gate import Gate


def run(job: Job, gate: Gate) -> None:
    """Train with trl's defaults, except for the settings that all contestants share."""
    model = AutoModelForImageTextToText.from_pretrained(job.base, dtype=getattr(torch, job.dtype)).to(job.device)
    options = SFTConfig(
        output_dir=str(job.scratch),
        max_steps=job.num_steps,
        per_device_train_batch_size=job.batch_size,
        learning_rate=job.learning_rate,
        lr_scheduler_type="constant",
        weight_decay=0.0,
        max_grad_norm=job.max_grad_norm,
        max_length=None,
        train_sampling_strategy="sequential",  # the rows lie in the order in which ours trains on them
        dataloader_num_workers=job.num_workers,
        gradient_checkpointing=False,  # trl's default, True, computes every forward twice; no other contestant does
        bf16=False,  # of torch's autocast; the weights are of the job's dtype, as for all contestants
        use_cpu=job.device == "cpu",
        save_strategy="no",
        report_to="none",
        seed=job.seed,
    )
    seen = _Seen(gate)
    trainer = _SeenTrainer(
        model=model,
        args=options,
        train_dataset=_dataset(job),
        processing_class=AutoProcessor.from_pretrained(job.base),
        peft_config=lora_config(job),
        callbacks=[seen],
    )
    trainer.seen = seen
    gate.ready(trainer.model)
    trainer.train()


def _dataset(job: Job) -> Dataset:
    """Return the rows of all steps, in order; images are opened when a row is read."""
    rows = read_rows(job.rows)
    columns: dict[str, list[Any]] = {"prompt": [], "completion": [], "images": []}
    for row in (rows[index] for index in job.order):
        columns["prompt"].append([{"role": "user", "content": row["question"]}])
        columns["completion"].append([{"role": "assistant", "content": row["answer"]}])
        columns["images"].append([row["image"]])
    return Dataset.from_dict(columns).cast_column("images", List(Image()))


class _Seen(TrainerCallback):
    """A callback that calls the gate after every step."""

    def __init__(self, gate: Gate):
        self.gate = gate
        self.loss: float | Tensor = 0.0
        self.supervised: int | Tensor = 0

    def on_step_end(self, args: Any, state: Any, control: Any, **rest: Any) -> None:
        self.gate.step(self.loss, self.supervised)


class _SeenTrainer(SFTTrainer):
    """The trainer of trl, with the last step's loss and labels."""

    seen: _Seen

    def training_step(self, model: nn.Module, inputs: dict[str, Any], num_items_in_batch: Any = None) -> Tensor:
        loss = super().training_step(model, inputs, num_items_in_batch)
        self.seen.loss, self.seen.supervised = loss.detach(), (inputs["labels"][:, 1:] != -100).sum()
        return loss
