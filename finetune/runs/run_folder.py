"""The folder of a run: its files, and the decision whether an unfinished run in it goes on.

::

    recipe.json  environment.json            the recipe as resolved; versions, machine, state of the checkout
    samples.txt  samples.html                rows as the model sees them; images with questions and answers
    log.jsonl  trackers/                     one line every few steps; what trackers keep here
    checkpoints/                             what a stopped run goes on from
    predictions-*.jsonl  scores-*.json       on the test split, of the base and of the adapter
    best/  last/  adapter/                   weights; ``adapter`` is complete with its manifest
    result.json                              written last: a folder without it holds an unfinished run
    previous/1, ...                          finished runs that were moved aside
    .lock                                    who writes here now
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
    """Hold the run's folder inside the block, for all processes of this run; nothing has been loaded yet.

    Raises:
        TrainingError: on every process. Another run holds the folder, it cannot be written, or it holds a finished
            run and the recipe does not say what is to become of that.
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
                error = TrainingError(f"{folder} cannot be written ({found.strerror}). Set another train.output_dir.")
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
    """Decide whether the run goes on or starts, and write the record of the run.

    Args:
        recipe: the recipe of the run.
        base: the base that the run adapts.
        splits: the rows of each split.
        accelerator: the accelerator of the run.
        log: the function that prints a line.
        init_from: the reference by digest of the adapter that the run starts from; None for a fresh one.

    Returns:
        Where checkpoints go, and the one to go on from, if any; the same one on every process.

    Raises:
        TrainingError: the folder holds an unfinished run of something else, or there is nothing to make longer.
    """
    folder = recipe.run_folder
    run = {
        # Where the adapter goes may be put right before a run goes on.
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
        # An adapter that is whole is never overwritten by a run that begins.
        if is_finished(folder) or (folder / "adapter").exists():
            log(f"the run that was in {folder} is kept in {set_aside(folder)}")
        checkpoints.clear()
        return None
    log(f"going on from {start.path}, {start.step} steps done (train.resume: never starts again)")
    _tell_versions(start, log)
    return start


def _extend(
    recipe: Recipe, checkpoints: Checkpoints, plan_of: Callable[..., Plan], log: Callable[[str], None]
) -> Checkpoint | None:
    """Return the checkpoint from which the run goes on to its new length; keep the finished run's adapter beside it.

    Raises:
        TrainingError: there is none, or the run is as long already.
    """
    folder, options = recipe.run_folder, recipe.train
    checkpoints.sweep()
    start = checkpoints.newest(log, extend=True)
    if start is None:
        raise TrainingError(f"train.resume is extend, but {folder} holds no checkpoint that can be gone on from.")
    finished, total = is_finished(folder), plan_of(options).total_steps
    if (finished or start.extended) and start.step >= total:
        raise TrainingError(
            f"train.resume is extend, but {folder} has taken {start.step} steps, and this recipe ends after {total}. "
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
            f"  the learning rate goes on as the schedule of {total} steps has it: {before:.2e} in step {start.step}, "
            f"{after:.2e} in step {start.step + 1}. A run of this length from its beginning would end otherwise."
        )
    if finished:
        log(f"  the adapter of the shorter run is kept in {set_aside(folder, going_on=True)}")
    _tell_versions(start, log)
    return start


def _tell_versions(start: Checkpoint, log: Callable[[str], None]) -> None:
    if (then := start.facts.get("versions")) != (now := versions()):
        log(f"  other versions than then, so other rounding: {then} then, {now} now")


def rows_digest(examples: Rows) -> str:
    """Return the digest of rows in their order: ids, messages, answers, captions and unsupervised turns.

    Of a stream, whose rows are not kept, it is that of its files' names and versions, and of its order.
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

    The bytes were read when the rows were checked, and are not read again. Images that a program draws count for
    nothing: recipe and version say what they are.
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
    """Return the commit of ``checkout``, and whether files differ from it; None where there is no git."""
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
    """Write a page of test rows with an image; rows that the adapter or the base got wrong come first.

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
def telling_of_a_full_disk(folder: Path) -> Iterator[None]:
    """Turn the error of a full disk into one error of this package that names the files that are complete."""
    try:
        yield
    except OSError as error:
        if error.errno not in (ENOSPC, EDQUOT):
            raise
        raise TrainingError(
            f"{error.strerror}: {error.filename or folder} could not be written. The checkpoints in "
            f"{folder / 'checkpoints'} are as they were: make room and start the run again, and it goes on from there."
        ) from error
