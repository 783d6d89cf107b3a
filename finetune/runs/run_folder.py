"""The folder of a run: its files, and the choice between a new run and an unfinished one.

::

    recipe.json  environment.json            the complete recipe; versions, machine, state of the checkout
    samples.txt  samples.html                rows as the model gets them; images with questions and answers
    log.jsonl  trackers/                     one line every few steps; the files of trackers
    checkpoints/                             the states from which a stopped run resumes
    predictions-*.jsonl  scores-*.json       on the test split, of the base and of the adapter
    best/  last/  adapter/                   weights; ``adapter`` has a manifest too
    result.json                              written last: a folder without it holds an unfinished run
    previous/1, ...                          finished runs that a later run moved aside
    .lock                                    the process that writes here now
"""

from __future__ import annotations

import contextlib
import platform
import subprocess
from errno import EDQUOT, ENOSPC
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from accelerate.utils import broadcast_object_list

from finetune.adapters.manifest import canonical_json, sha256_hex
from finetune.core.folder_lock import locked
from finetune.core.json_file import write_json
from finetune.data.image_checks import IMAGES
from finetune.data.stream import Stream
from finetune.errors import FinetuneError, TrainingError
from finetune.evaluation.report import samples_of, write_page
from finetune.preflight.finished_runs import CHECKPOINTS, RECIPE, is_finished, refuse_taken, set_aside
from finetune.training.checkpoint import Checkpoint, Checkpoints
from finetune.training.plan import Plan, learning_rate_factor
from finetune.training.state import versions

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping

    from accelerate import Accelerator

    from finetune.assemble.base import Base
    from finetune.data.stream import Rows
    from finetune.evaluation.evaluate import Evaluation
    from finetune.recipe import Recipe

CARDS = 12  # rows on the page of samples


@contextlib.contextmanager
def run_lock(recipe: Recipe, accelerator: Accelerator) -> Iterator[None]:
    """Lock the run's folder inside the block, for all processes of this run; call it before anything is loaded.

    Raises:
        TrainingError: another run holds the folder, it cannot be written, or it holds a finished run that the recipe
            does not move aside or extend. Every process raises it.
    """
    folder = recipe.run_folder
    with contextlib.ExitStack() as stack:
        problem: list[str | None] = [None]
        error: Exception | None = None
        if accelerator.is_main_process:
            other = "Or give this run another name or train.output_dir."
            try:
                stack.enter_context(locked(folder, what_else=other))
                refuse_taken(recipe)
            except FinetuneError as found:
                error = found
            except OSError as found:
                error = TrainingError(
                    f"the folder of a run must be writable, but {folder} is not ({found.strerror}). "
                    "Set another train.output_dir."
                )
            problem = [str(error) if error else None]
        if accelerator.num_processes > 1:
            broadcast_object_list(problem)
        if problem[0]:
            raise error or TrainingError(problem[0])
        yield


def open_run(
    recipe: Recipe,
    base: Base,
    splits: Mapping[str, Rows],
    accelerator: Accelerator,
    log: Callable[[str], None],
    *,
    init_from: str | None = None,
) -> tuple[Checkpoints, Checkpoint | None]:
    """Choose the checkpoint that the run resumes from, and write the record of the run.

    Args:
        recipe: the recipe of the run.
        base: the base that the run adapts.
        splits: the rows of each split.
        accelerator: the accelerator of the run.
        log: the function that prints a line.
        init_from: the reference by digest of the adapter that the run starts from; None for a fresh one.

    Returns:
        The checkpoints of the run, and the one to resume from, the same on every process; None for a new run.

    Raises:
        TrainingError: the folder holds an unfinished run of another recipe, or no run that can be extended.
    """
    folder = recipe.run_folder
    run = {
        # The place of the adapter may change before a run resumes.
        "recipe": {key: value for key, value in recipe.identity().items() if key != "adapter"},
        "base": base.identity.digest,
        "rows": {split: rows_digest(rows) for split, rows in splits.items()},
        "images": {split: images_digest(rows) for split, rows in splits.items()},
        "num_processes": accelerator.num_processes,
        "init_from": init_from,
    }
    checkpoints = Checkpoints(folder / CHECKPOINTS, run, keep=recipe.train.save_total_limit)
    extend = recipe.train.resume == "extend"
    chosen: list[Path | None] = [None]
    if accelerator.is_main_process:
        folder.mkdir(parents=True, exist_ok=True)
        rows = splits["train"]
        plan = partial(
            Plan.of,
            num_rows=None if isinstance(rows, Stream) else len(rows),
            num_processes=accelerator.num_processes,
            seed=recipe.seed,
        )
        start = _extend(recipe, checkpoints, plan, log) if extend else _choose(recipe, checkpoints, log)
        chosen = [start.path if start else None]
        write_json(folder / RECIPE, recipe.model_dump(mode="json"))
        write_json(folder / "environment.json", environment(accelerator))
    if accelerator.num_processes > 1:
        broadcast_object_list(chosen)
    return checkpoints, checkpoints.read(chosen[0], extend=extend) if chosen[0] else None


def _choose(recipe: Recipe, checkpoints: Checkpoints, log: Callable[[str], None]) -> Checkpoint | None:
    start = None
    if recipe.train.resume == "auto":
        checkpoints.sweep()
        start = checkpoints.newest(log)
    if start is None:
        folder = recipe.run_folder
        # A new run never overwrites a complete adapter.
        if is_finished(folder) or (folder / "adapter").exists():
            log(f"the run that was in {folder} is kept in {set_aside(folder)}")
        checkpoints.clear()
        return None
    log(f"going on from {start.path}, {start.step} steps done (train.resume=never starts again)")
    _log_versions(start, log)
    return start


def _extend(
    recipe: Recipe, checkpoints: Checkpoints, plan_of: Callable[..., Plan], log: Callable[[str], None]
) -> Checkpoint | None:
    """Return the checkpoint from which the run continues to its new length; keep the finished run's adapter beside it.

    Raises:
        TrainingError: there is no checkpoint, or the run already has that length.
    """
    folder, options = recipe.run_folder, recipe.train
    checkpoints.sweep()
    start = checkpoints.newest(log, extend=True)
    if start is None:
        raise TrainingError(
            f"train.resume=extend needs a checkpoint to go on from, but {folder} holds none that can be used. "
            "Set train.resume=never to run the recipe again from its beginning."
        )
    finished, total = is_finished(folder), plan_of(options).total_steps
    if (finished or start.extended) and start.step >= total:
        raise TrainingError(
            f"train.resume=extend needs a longer recipe, but the run in {folder} has taken {start.step} steps and this "
            f"recipe ends after {total}. "
            "Set a larger train.epochs or train.max_steps."
        )
    log(f"going on from {start.path}, {start.step} steps done, to step {total}")
    if start.extended:
        then = start.facts["run"]["recipe"]["train"]
        old = options.model_copy(update={key: then.get(key) for key in ("epochs", "max_steps")})
        before, after = (
            options.learning_rate * learning_rate_factor(step, length, plan_of(length).total_steps)
            for step, length in ((start.step - 1, old), (start.step, options))
        )
        log(
            f"  the learning rate now follows the schedule of {total} steps: {before:.2e} in step {start.step}, "
            f"{after:.2e} in step {start.step + 1}. A single run of this length would give another result."
        )
    if finished:
        log(f"  the adapter of the shorter run is kept in {set_aside(folder, going_on=True)}")
    _log_versions(start, log)
    return start


def _log_versions(start: Checkpoint, log: Callable[[str], None]) -> None:
    if (then := start.facts.get("versions")) != (now := versions()):
        log(f"  the versions of libraries changed, so rounding may differ: {then} before, {now} now")


def rows_digest(examples: Rows) -> str:
    """Return the digest of rows in their order: ids, messages, answers, captions and unsupervised turns.

    A stream keeps no rows: its digest is that of the names and versions of its files, and of its order.
    """
    if isinstance(examples, Stream):
        return sha256_hex(canonical_json(examples.identity))
    return sha256_hex(
        canonical_json([
            [e.id, e.messages, e.answers, e.captions, sorted(e.unsupervised), *([e.columns] if e.columns else [])]
            for e in examples
        ])
    )  # fmt: skip


def images_digest(examples: Rows) -> str | None:
    """Return the digest of the bytes of all images of rows, in their order; None for a stream.

    The check of the rows has read the bytes, so this function does not read them again. Images that a program draws do
    not count: recipe and version determine them.
    """
    if isinstance(examples, Stream):
        return None
    return sha256_hex(canonical_json([example.meta.get(IMAGES, []) for example in examples]))


def environment(accelerator: Accelerator) -> dict[str, Any]:
    """Return the versions and hardware that the run uses."""
    return {
        "python": platform.python_version(),
        "platform": platform.platform(),
        "versions": versions(),
        "git": git_state(Path(__file__).resolve().parents[2]),
        "device": str(accelerator.device),
        "num_processes": accelerator.num_processes,
    }


def git_state(checkout: Path) -> dict[str, Any] | None:
    """Return the commit of ``checkout``, and whether files differ from it; None if there is no git."""
    if not (checkout / ".git").exists():
        return None

    def git(*args: str) -> str:
        done = subprocess.run(
            ["git", "-C", str(checkout), *args], capture_output=True, text=True, timeout=30, check=True
        )
        return done.stdout.strip()

    try:
        return {"commit": git("rev-parse", "HEAD"), "dirty": bool(git("status", "--porcelain"))}
    except (OSError, subprocess.SubprocessError):
        return None


def write_samples(path: Path, recipe: Recipe, evaluations: Mapping[str, Evaluation]) -> None:
    """Write a page of test rows with an image, first those that the adapter or the base answered wrongly.

    Args:
        path: the path of the HTML file.
        recipe: the recipe of the run.
        evaluations: the evaluations of ``base`` and ``adapter``, on the same rows.
    """
    write_page(
        path,
        title=f"{recipe.domain}/{recipe.name}",
        intro="The frozen base and the adapter on the test split.",
        evaluations=list(evaluations.values()),
        own={"adapter": recipe.name},
        samples={
            "Test rows, wrong ones first": samples_of(
                list(evaluations.values()), most=CARDS, wrong_first=list(evaluations)[::-1]
            )
        },
    )


@contextlib.contextmanager
def full_disk_explained(folder: Path) -> Iterator[None]:
    """Turn the error of a full disk into an error of this package that names the complete files."""
    try:
        yield
    except OSError as error:
        if error.errno not in (ENOSPC, EDQUOT):
            raise
        raise TrainingError(
            f"{error.strerror}: {error.filename or folder} could not be written. The checkpoints in "
            f"{folder / 'checkpoints'} are complete: make room and start the run again, and it goes on from them."
        ) from error
