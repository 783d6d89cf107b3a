"""The accelerator of a run, and the check that the launch gave what the run asked for."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

from accelerate import Accelerator
from accelerate.utils import DistributedDataParallelKwargs, is_deepspeed_available

from finetune.errors import TrainingError

if TYPE_CHECKING:
    from finetune.recipe import Recipe


def accelerator_of(recipe: Recipe) -> Accelerator:
    """Return the accelerator of a run.

    Raises:
        TrainingError: it is not what was asked for.
    """
    trackers = list(recipe.train.trackers)
    if os.environ.get("ACCELERATE_USE_DEEPSPEED") == "true" and not is_deepspeed_available():
        raise TrainingError("DeepSpeed is not installed: pip install deepspeed, or use recipes/accelerate/fsdp2.yaml.")
    accelerator = Accelerator(
        gradient_accumulation_steps=1,
        cpu=recipe.model.device == "cpu",
        log_with=trackers or None,
        project_dir=str(recipe.run_folder / "trackers"),
        # Every process has the base's buffers, and one that takes a step again must not wait for the others to.
        kwargs_handlers=[DistributedDataParallelKwargs(broadcast_buffers=False)],
    )
    check_launch(accelerator, recipe)
    return accelerator


def check_launch(accelerator: Accelerator, recipe: Recipe) -> None:
    """Raise TrainingError where an accelerator differs from the request of the launch or the recipe."""
    # The second is torchrun's: processes that it started may each have become a run of their own.
    for asked in (os.environ.get("FINETUNE_NUM_PROCESSES"), os.environ.get("WORLD_SIZE")):
        if asked and int(asked) != accelerator.num_processes:
            raise TrainingError(
                f"{asked} processes were asked for, but this run has {accelerator.num_processes}. On a CPU use "
                "NPROC=N ./launch.sh CONFIG: accelerate launch --cpu starts one process only."
            )
    if accelerator.mixed_precision != "no":
        raise TrainingError(
            f"accelerate's mixed_precision is {accelerator.mixed_precision}; the recipe's model.dtype says what the "
            "base is held in. Set mixed_precision: no in the accelerate config."
        )
    if recipe.model.device not in ("auto", accelerator.device.type):
        raise TrainingError(f"model.device is {recipe.model.device}, but accelerate gives {accelerator.device}")
