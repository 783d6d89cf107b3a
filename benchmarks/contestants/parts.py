"""The common parts of several contestants: the recipe, PEFT's model, batches that are ready in memory."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoConfig

from finetune.assemble.loading import base_of
from finetune.assemble.rows import training_rows
from finetune.recipe import Recipe, parse_recipe
from finetune.training.plan import Plan

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedModel

    from benchmarks.contestants import Job
    from finetune.assemble.base import Base
    from finetune.core.batch import Batch


def recipe_of(job: Job, *, store: bool = False) -> Recipe:
    """Return the recipe of ours; the others take the common settings from it."""
    return parse_recipe(raw_recipe(job, store=store), source="benchmark")


def raw_recipe(job: Job, *, store: bool) -> dict[str, Any]:
    """Return the recipe as a file would hold it."""
    language = {"layers": f"last {job.last_layers}"} if job.last_layers else "all-linear"
    towers = {"language": language, "projector": "all-linear" if job.projector else "none"}
    train: dict[str, Any] = {
        "max_steps": job.num_steps,
        "batch_size": job.batch_size,
        "learning_rate": job.learning_rate,
        "lr_scheduler_type": "constant",
        "warmup_ratio": 0.0,
        "weight_decay": 0.0,
        "max_grad_norm": job.max_grad_norm,
        "group_by_length": False,  # so that the others can be given the same order; all rows are as long
        "num_workers": job.num_workers,
        "feature_store": "auto" if store else "off",
        "output_dir": str(job.scratch),
    }
    return {
        "name": "benchmark",
        "domain": "benchmark",
        "seed": job.seed,
        "model": {"name_or_path": str(job.base), "device": job.device, "dtype": job.dtype},
        "method": {"name": "lora", "r": job.r, "lora_alpha": job.lora_alpha, "towers": towers},
        "data": {"source": "jsonl", "root": str(job.rows), "val": None, "test": None},
        "train": train,
    }


def order_of(recipe: Recipe, *, num_rows: int) -> tuple[int, ...]:
    """Return the rows that ours trains on, in order, for the others too."""
    plan = Plan.of(recipe.train, num_rows=num_rows, num_processes=1, seed=recipe.seed)
    return tuple(int(row) for step in range(plan.total_steps) for row in plan.rows(step))


def lora_config(job: Job) -> LoraConfig:
    """Return PEFT's LoRA on the same modules as ours, by the module names of its family."""
    modules = r"model\.(language_model|text_model)\..*_proj"
    if job.last_layers:
        total = AutoConfig.from_pretrained(job.base).get_text_config().num_hidden_layers
        numbers = "|".join(map(str, range(total - job.last_layers, total)))
        modules = rf"model\.(language_model|text_model)\.layers\.({numbers})\..*_proj"
    if job.projector:
        modules = rf"{modules}|model\.connector\..*proj"
    return LoraConfig(r=job.r, lora_alpha=job.lora_alpha, target_modules=modules)


def peft_model(job: Job, base: PreTrainedModel) -> PeftModel:
    """Return a base with a fresh LoRA, in training mode."""
    torch.manual_seed(job.seed)
    return get_peft_model(base, lora_config(job)).train()


def trainable(model: torch.nn.Module) -> list[torch.nn.Parameter]:
    """Return the parameters that train."""
    return [parameter for parameter in model.parameters() if parameter.requires_grad]


def base_and_batches(job: Job) -> tuple[Base, list[Batch]]:
    """Return the base and the batches of all steps, on its device."""
    recipe = recipe_of(job)
    base = base_of(recipe, device=job.device)
    rows = training_rows(recipe, base=base)
    batches = [base.collator.training_batch([rows[i] for i in job.step_rows(s)]) for s in range(job.num_steps)]
    return base, [batch.to(base.model.device, base.model.dtype) for batch in batches]
