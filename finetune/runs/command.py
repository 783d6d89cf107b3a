"""The entrance of ``finetune train`` and of ``recipes/train.py``."""

import signal
from collections.abc import Sequence
from pathlib import Path

from finetune.errors import StoppedError
from finetune.preflight import check_recipe
from finetune.recipe import load_recipe


def train_config(config: str | Path, overrides: Sequence[str]) -> None:
    """Run the recipe in a file; all that needs no torch is checked before torch is imported.

    Args:
        config: the path of the recipe.
        overrides: the words ``key=value`` of the command line.

    Raises:
        StoppedError: a signal asked to stop; the same command goes on.
        FinetuneError: anything else that stops the run, with what to do.
    """
    try:
        recipe = load_recipe(config, overrides)
        check_recipe(recipe)
        from finetune.runs.train import train

        train(recipe)
    except KeyboardInterrupt:
        message = "stopped outside training: nothing is lost. Run the same command again to continue."
        raise StoppedError(message, signum=signal.SIGINT) from None
