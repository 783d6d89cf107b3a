"""The entrance of ``finetune train`` and of ``recipes/train.py``."""

import signal
from collections.abc import Sequence
from pathlib import Path

from finetune.core.quick_imports import quick_imports
from finetune.errors import StoppedError
from finetune.launch.threads import set_threads
from finetune.preflight import check_recipe
from finetune.recipe import load_recipe


def train_config(config: str | Path, overrides: Sequence[str]) -> None:
    """Run the recipe in a file, after all checks that need no torch.

    Args:
        config: the path of the recipe.
        overrides: the words ``key=value`` of the command line.

    Raises:
        StoppedError: a signal asked to stop; the same command resumes the run.
        FinetuneError: any other error that stops the run, with advice.
    """
    try:
        recipe = load_recipe(config, overrides)
        check_recipe(recipe)
        set_threads(recipe.train.num_threads)  # before torch is imported
        with quick_imports():
            from finetune.runs.train import train

        train(recipe)
    except KeyboardInterrupt:
        message = "stopped before or after training, so no step was lost. Run the same command again to go on."
        raise StoppedError(message, signum=signal.SIGINT) from None
