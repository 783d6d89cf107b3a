"""Checks of a run's folder: files of others are left alone, and a finished run is kept or extended."""

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
_COPIED = ("log.jsonl", "best", "predictions-base.jsonl", "scores-base.json")  # what a longer run goes on with
# Keys that a run completes from its data -> the value by which a recipe leaves them to it.
_FROM_DATA = {
    "task.system_prompt": None,
    "task.image_position": None,
    "task.max_new_tokens": None,
    "data.image_range": "auto",
}
_LEFT = (PREVIOUS, LOCK_NAME, CHECKPOINTS, "trackers", RECIPE, *_COPIED)
_SECTIONS = ("name", "domain", "model", "method", "data", "train")  # in the recipe of a run, of whatever release
_LISTED = 5  # entries of a folder that an error names


def is_finished(folder: Path) -> bool:
    """Return whether a run's folder holds a run that came to its end."""
    return (folder / RESULT).exists()


def refuse_taken(recipe: Recipe) -> None:
    """Check that a run may write in its folder, before anything is loaded.

    Raises:
        TrainingError: the folder holds files of others; or a finished run, and ``train.resume`` does not say what is
            to become of it; or there is nothing that could be made longer.
    """
    folder, resume = recipe.run_folder, recipe.train.resume
    _refuse_foreign(folder)
    if resume == "extend" and not any(folder.glob(f"{CHECKPOINTS}/step-*")):
        raise TrainingError(
            f"train.resume is extend, but {folder} holds no checkpoint to go on from. Leave train.resume out to start "
            "a run there."
        )
    if resume != "auto" or not is_finished(folder):
        return
    changed = changed_since(recipe)
    where = f"{folder} holds a finished run{_published(folder)}, its adapter in {folder / 'adapter'}"
    again = (
        f"train.resume=never runs it again from its beginning, with all that is there kept in {next_previous(folder)}; "
        "another name or train.output_dir leaves it alone."
    )
    if changed is None:
        raise TrainingError(f"{where}; its {RECIPE} cannot be read, so nothing tells what was run. {again}")
    if not changed:
        raise TrainingError(
            f"{where}. It is this very recipe, so there is nothing to do. {again} A larger train.epochs or "
            "train.max_steps with train.resume=extend goes on from its last step."
        )
    longer = (
        " train.resume=extend goes on from its last step to the new length." if is_longer_only(changed.keys()) else ""
    )
    raise TrainingError(f"{where}. Its recipe is another one: {describe(changed)}.{longer} {again}")


def _refuse_foreign(folder: Path) -> None:
    if not folder.is_dir():
        return
    ours = (folder / LOCK_NAME, aside_of(folder / RECIPE))  # what a run that is killed at once leaves
    # A link of such a name was put there by somebody else, whatever it leads to.
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
    """Return whether a file is the recipe that a run of this release, or of another one, wrote."""
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return False
    return isinstance(raw, dict) and raw.keys() >= set(_SECTIONS)


def _has_results(folder: Path) -> bool:
    """Return whether a run wrote checkpoints or an adapter here: its recipe may have been damaged since."""
    if any(folder.glob(f"{CHECKPOINTS}/step-*/checkpoint.json")):
        return True
    return is_finished(folder) and (folder / "adapter" / "manifest.json").is_file()


def changed_since(recipe: Recipe) -> dict[str, tuple[Any, Any]] | None:
    """Return the differences between the recipe in a run's folder and ``recipe``; None where that cannot be read."""
    try:
        raw = json.loads((recipe.run_folder / RECIPE).read_text(encoding="utf-8"))
        there = parse_recipe(raw, source=RECIPE)
    except (OSError, ValueError, RecipeError, RecursionError):
        return None
    found = differing(_what_trains(there), _what_trains(recipe))
    # What a recipe leaves to the data stands in the folder as the data had it.
    return {key: values for key, values in found.items() if key not in _FROM_DATA or values[1] != _FROM_DATA[key]}


def set_aside(folder: Path, *, going_on: bool = False) -> Path:
    """Move the files of a run into ``previous/<number>``, and return that folder.

    Args:
        folder: the folder of the run.
        going_on: whether a longer run goes on from its checkpoints: these stay, and so do copies of files it adds to.
    """
    target = next_previous(folder)
    target.mkdir(parents=True)
    stay = _LEFT if going_on else (PREVIOUS, LOCK_NAME, RECIPE)
    # The recipe is never away: without it the folder would be that of others.
    for name in (RECIPE, *(_COPIED if going_on else ())):
        if (folder / name).is_dir():
            shutil.copytree(folder / name, target / name)
        elif (folder / name).exists():
            shutil.copy2(folder / name, target / name)
    # What says that the run is finished goes last: a process that is killed in between leaves a finished run.
    for path in sorted(folder.iterdir(), key=lambda path: (path.name == RESULT, path.name)):
        if path.name not in stay:
            path.rename(target / path.name)
    return target


def next_previous(folder: Path) -> Path:
    """Return the folder for the next run that is moved aside."""
    taken = [int(path.name) for path in folder.glob(f"{PREVIOUS}/*") if path.name.isdecimal()]
    return folder / PREVIOUS / str(max(taken, default=0) + 1)


def _published(folder: Path) -> str:
    result = Result.read(folder)
    return f", published as {result.ref}" if result and result.ref else ""


def _what_trains(recipe: Recipe) -> dict[str, Any]:
    # Where the adapter goes changes nothing of it; what it starts from does.
    return recipe.identity() | {"adapter": {"init_from": recipe.adapter.init_from}}
