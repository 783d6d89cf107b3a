"""Checks of a run's folder, so that a run leaves other files alone and keeps or extends a finished run."""

from __future__ import annotations

import json
import shutil
from typing import TYPE_CHECKING, Any

from finetune.core.folder_lock import LOCK_NAME
from finetune.core.json_file import aside_of
from finetune.errors import RecipeError, TrainingError, plain
from finetune.preflight.result import RESULT, Result
from finetune.recipe import parse_recipe
from finetune.recipe.differing import describe, differing, is_longer_only

if TYPE_CHECKING:
    from pathlib import Path

    from finetune.recipe import Recipe

RECIPE = "recipe.json"
CHECKPOINTS = "checkpoints"
PREVIOUS = "previous"
_COPIED = ("log.jsonl", "best", "predictions-base.jsonl", "scores-base.json")  # files that a longer run adds to
# Keys that a run completes from its data -> the value with which a recipe leaves them open.
_FROM_DATA = {
    "task.system_prompt": None,
    "task.image_position": None,
    "task.max_new_tokens": None,
    "data.image_range": "auto",
}
_LEFT = (PREVIOUS, LOCK_NAME, CHECKPOINTS, "trackers", RECIPE, *_COPIED)
_SECTIONS = ("name", "domain", "model", "method", "data", "train")  # in the recipe of a run of each release
_LISTED = 5  # entries of a folder that an error names


def is_finished(folder: Path) -> bool:
    """Return whether a run's folder holds a finished run."""
    return (folder / RESULT).exists()


def refuse_taken(recipe: Recipe) -> None:
    """Check that a run may write in its folder, before anything is loaded.

    Raises:
        TrainingError: the folder holds other files; or a finished run that ``train.resume`` does not move aside or
            extend; or no run that could be extended.
    """
    folder, resume = recipe.run_folder, recipe.train.resume
    _refuse_foreign(folder)
    if resume == "extend" and not any(folder.glob(f"{CHECKPOINTS}/step-*")):
        raise TrainingError(
            f"train.resume=extend needs a checkpoint to go on from, but {folder} holds none. Leave train.resume out to "
            "start a run there."
        )
    if resume != "auto" or not is_finished(folder):
        return
    changed = changed_since(recipe)
    where = f"{folder} holds a finished run{_published(folder)}, its adapter in {folder / 'adapter'}"
    again = (
        f"train.resume=never runs it again from its beginning, and keeps the present files in {next_previous(folder)}; "
        "another name or train.output_dir leaves it unchanged."
    )
    if changed is None:
        raise TrainingError(f"{where}; its {RECIPE} cannot be read, so the recipe of that run is unknown. {again}")
    if not changed:
        raise TrainingError(
            f"{where}. It has the same recipe, so there is nothing to do. {again} A larger train.epochs or "
            "train.max_steps with train.resume=extend goes on from its last step."
        )
    longer = (
        " train.resume=extend goes on from its last step to the new length." if is_longer_only(changed.keys()) else ""
    )
    raise TrainingError(f"{where}. Its recipe differs: {describe(changed)}.{longer} {again}")


def _refuse_foreign(folder: Path) -> None:
    if not folder.is_dir():
        return
    ours = (folder / LOCK_NAME, aside_of(folder / RECIPE))  # a run that is killed at once leaves these
    # A run makes no links, so a link with such a name is a foreign file.
    names = sorted(path.name for path in folder.iterdir() if path not in ours or path.is_symlink())
    if not names or _is_recipe(folder / RECIPE) or _has_results(folder):
        return
    listed = ", ".join(plain(name, 60) for name in names[:_LISTED])
    more = f" and {len(names) - _LISTED} more" if len(names) > _LISTED else ""
    raise TrainingError(
        f"a run's folder must be empty or hold a run, but {folder} holds {listed}{more}, and no {RECIPE} of a run "
        "that can be read. Nothing was written. Move these files away, or give the run another name or "
        "train.output_dir."
    )


def _is_recipe(path: Path) -> bool:
    """Return whether a file is the recipe of a run, of this or another release."""
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return False
    return isinstance(raw, dict) and raw.keys() >= set(_SECTIONS)


def _has_results(folder: Path) -> bool:
    """Return whether a run wrote checkpoints or an adapter here; its recipe may be damaged."""
    if any(folder.glob(f"{CHECKPOINTS}/step-*/checkpoint.json")):
        return True
    return is_finished(folder) and (folder / "adapter" / "manifest.json").is_file()


def changed_since(recipe: Recipe) -> dict[str, tuple[Any, Any]] | None:
    """Return the differences between the recipe in a run's folder and ``recipe``; None if the first is unreadable."""
    try:
        raw = json.loads((recipe.run_folder / RECIPE).read_text(encoding="utf-8"))
        there = parse_recipe(raw, source=RECIPE)
    except (OSError, ValueError, RecipeError, RecursionError):
        return None
    found = differing(_what_trains(there), _what_trains(recipe))
    # The recipe in the folder holds the values that the data gave.
    return {key: values for key, values in found.items() if key not in _FROM_DATA or values[1] != _FROM_DATA[key]}


def set_aside(folder: Path, *, going_on: bool = False) -> Path:
    """Move the files of a run into ``previous/<number>``, and return that folder.

    Args:
        folder: the folder of the run.
        going_on: True if a longer run continues from its checkpoints: these stay, with copies of the files that
            the longer run adds to.
    """
    target = next_previous(folder)
    target.mkdir(parents=True)
    stay = _LEFT if going_on else (PREVIOUS, LOCK_NAME, RECIPE)
    # The recipe always stays: without it the folder would count as foreign.
    for name in (RECIPE, *(_COPIED if going_on else ())):
        if (folder / name).is_dir():
            shutil.copytree(folder / name, target / name)
        elif (folder / name).exists():
            shutil.copy2(folder / name, target / name)
    # Move the result last: a process that is killed before that leaves a finished run.
    for path in sorted(folder.iterdir(), key=lambda path: (path.name == RESULT, path.name)):
        if path.name not in stay:
            path.rename(target / path.name)
    return target


def next_previous(folder: Path) -> Path:
    """Return the folder for the next run to move aside."""
    taken = [int(path.name) for path in folder.glob(f"{PREVIOUS}/*") if path.name.isdecimal()]
    return folder / PREVIOUS / str(max(taken, default=0) + 1)


def _published(folder: Path) -> str:
    result = Result.read(folder)
    return f", published as {result.ref}" if result and result.ref else ""


def _what_trains(recipe: Recipe) -> dict[str, Any]:
    # The place of the adapter does not change it; the adapter that it starts from does.
    return recipe.identity() | {"adapter": {"init_from": recipe.adapter.init_from}}
