"""Experiment trackers: accelerate's own, by name."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from accelerate.utils import (
    is_mlflow_available,
    is_tensorboard_available,
    is_trackio_available,
    is_wandb_available,
)

from finetune.errors import TrainingError
from finetune.recipe.published import published_recipe

if TYPE_CHECKING:
    from collections.abc import Sequence

    from accelerate import Accelerator

    from finetune.recipe import Recipe

_AVAILABLE = {
    "tensorboard": is_tensorboard_available,
    "wandb": is_wandb_available,
    "mlflow": is_mlflow_available,
    "trackio": is_trackio_available,
}


def check_trackers(names: Sequence[str]) -> None:
    """Check that the packages of all trackers are installed; accelerate would leave out the others silently.

    Raises:
        TrainingError: a package is not installed.
    """
    missing = [name for name in names if not _AVAILABLE[name]()]
    if missing:
        there = [name for name, is_available in _AVAILABLE.items() if is_available()]
        raise TrainingError(
            f"train.trackers must name installed packages, got {', '.join(missing)} (installed: "
            f"{', '.join(there) or 'none'}). Install it (pip install {' '.join(missing)}), or remove it from "
            "train.trackers."
        )


def start_trackers(accelerator: Accelerator, recipe: Recipe) -> None:
    """Start the accelerator's trackers as a project of the run's name, with the published recipe.

    Raises:
        TrainingError: a tracker does not start, as without a login.
    """
    try:
        accelerator.init_trackers(recipe.name, config=_flat(published_recipe(recipe)))
    except Exception as error:
        raise TrainingError(
            f"a tracker of train.trackers ({', '.join(recipe.train.trackers)}) does not start: {error}. Set it up, or "
            "remove it from train.trackers."
        ) from error


def finish_trackers(accelerator: Accelerator) -> None:
    """Finish every tracker, so that it writes the values that it still holds."""
    for tracker in accelerator.trackers:
        tracker.finish()
    accelerator.trackers = []


def _flat(value: Any, key: str = "") -> dict[str, Any]:
    """Return nested data as dotted keys; a list and None become text, which every tracker takes."""
    if isinstance(value, dict):
        return {k: v for name, part in value.items() for k, v in _flat(part, f"{key}.{name}".lstrip(".")).items()}
    return {key: value if isinstance(value, bool | int | float | str) else str(value)}
