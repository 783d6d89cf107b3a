"""The accelerator of a run, and the check that it fits the launch and the recipe."""

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
        TrainingError: the accelerator differs from the launch or the recipe, or DeepSpeed is not installed.
    """
    trackers = list(recipe.train.trackers)
    if os.environ.get("ACCELERATE_USE_DEEPSPEED") == "true" and not is_deepspeed_available():
        raise TrainingError(
            "the accelerate config needs DeepSpeed, which is not installed. Install it with pip install deepspeed, or "
            "use recipes/accelerate/fsdp2.yaml."
        )
    accelerator = Accelerator(
        gradient_accumulation_steps=1,
        cpu=recipe.model.device == "cpu",
        log_with=trackers or None,
        project_dir=str(recipe.run_folder / "trackers"),
        # Every process has the base's buffers, and a process that repeats a step must not wait for the others.
        kwargs_handlers=[DistributedDataParallelKwargs(broadcast_buffers=False)],
    )
    check_launch(accelerator, recipe)
    return accelerator


def check_launch(accelerator: Accelerator, recipe: Recipe) -> None:
    """Check that an accelerator fits the launch and the recipe.

    Raises:
        TrainingError: the number of processes, the precision or the device is another one.
    """
    # torchrun sets WORLD_SIZE: each process that it started may have become a run of its own.
    for asked in (os.environ.get("FINETUNE_NUM_PROCESSES"), os.environ.get("WORLD_SIZE")):
        if asked and int(asked) != accelerator.num_processes:
            raise TrainingError(
                f"the launch must start {asked} processes, but this run has {accelerator.num_processes}. On a CPU use "
                "NPROC=N ./launch.sh CONFIG: accelerate launch --cpu starts only one process."
            )
    if accelerator.mixed_precision != "no":
        raise TrainingError(
            f"accelerate's mixed_precision must be no, got {accelerator.mixed_precision}: the recipe's model.dtype "
            "sets the dtype of the base. Set mixed_precision: no in the accelerate config."
        )
    if recipe.model.device not in ("auto", accelerator.device.type):
        raise TrainingError(
            f"model.device must be accelerate's device, got {recipe.model.device} in the recipe and "
            f"{accelerator.device} from accelerate. Set model.device: auto, or change the accelerate config."
        )
