"""What a run's folder holds, and whether an unfinished run in it goes on.

::

    recipe.json  environment.json            the recipe as resolved; versions, machine, state of the checkout
    samples.txt  samples.html                rows as the model sees them; pictures with questions and answers
    log.jsonl  trackers/                     one line every few steps; what trackers keep here
    checkpoints/                             what a stopped run goes on from
    predictions-*.jsonl  scores-*.json       on the test split, of the base and of the adapter
    best/  last/  adapter/                   weights; ``adapter`` is complete with its manifest
    result.json                              written last: a folder without it holds an unfinished run
"""

from __future__ import annotations

import contextlib
import json
import platform
import subprocess
from errno import EDQUOT, ENOSPC
from pathlib import Path
from typing import TYPE_CHECKING, Any

from accelerate.utils import broadcast_object_list

from finetune.adapters.manifest import canonical_json, sha256_hex
from finetune.data.images import open_image
from finetune.data.stream import Stream
from finetune.errors import TrainingError
from finetune.report.page import Sample, write_page
from finetune.training.checkpoint import Checkpoint, Checkpoints
from finetune.training.state import versions

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence

    from accelerate import Accelerator

    from finetune.build import Base
    from finetune.data.stream import Rows
    from finetune.example import Example
    from finetune.interfaces import Task
    from finetune.prediction import Prediction
    from finetune.recipe import Recipe
    from finetune.training.evaluate import Scores

RESULT = "result.json"
CARDS = 12  # rows on the page of samples


def open_run(
    recipe: Recipe,
    base: Base,
    splits: Mapping[str, Rows],
    accelerator: Accelerator,
    say: Callable[[str], None],
) -> tuple[Checkpoints, Checkpoint | None]:
    """Decides whether the run goes on or starts, and writes down what is being run.

    Returns:
        Where checkpoints go, and the one to go on from, if any; the same one on every process.

    Raises:
        TrainingError: the folder holds an unfinished run of something else.
    """
    folder = recipe.run_folder
    run = {
        # Where the adapter goes may be put right before a run goes on.
        "recipe": {key: value for key, value in recipe.identity().items() if key != "adapter"},
        "base": base.identity.digest,
        "rows": {split: rows_digest(rows) for split, rows in splits.items()},
        "num_processes": accelerator.num_processes,
    }
    checkpoints = Checkpoints(folder / "checkpoints", run, keep=recipe.train.save_total_limit)
    chosen: list[Path | None] = [None]
    if accelerator.is_main_process:
        folder.mkdir(parents=True, exist_ok=True)
        start = _choose(recipe, checkpoints, say)
        chosen = [start.path if start else None]
        (folder / RESULT).unlink(missing_ok=True)
        write_json(folder / "recipe.json", recipe.model_dump(mode="json"))
        write_json(folder / "environment.json", environment(accelerator))
    if accelerator.num_processes > 1:
        broadcast_object_list(chosen)
    return checkpoints, checkpoints.read(chosen[0]) if chosen[0] else None


def _choose(recipe: Recipe, checkpoints: Checkpoints, say: Callable[[str], None]) -> Checkpoint | None:
    finished = (recipe.run_folder / RESULT).exists()
    if finished or recipe.train.resume == "never":
        checkpoints.clear()
        return None
    checkpoints.sweep()
    start = checkpoints.newest(say)
    if start:
        say(f"going on from {start.path}, {start.step} steps done (train.resume: never starts again)")
        if (then := start.facts["versions"]) != (now := versions()):
            say(f"  other versions than then, so other rounding: {then} then, {now} now")
    return start


def rows_digest(examples: Rows) -> str:
    """Returns the digest of rows in their order: ids, messages and answers, or of a stream's files and order.

    Pictures are not read.
    """
    if isinstance(examples, Stream):
        return sha256_hex(canonical_json(examples.identity))
    return sha256_hex(canonical_json([[e.id, e.messages, e.answers, e.captions] for e in examples]))


def environment(accelerator: Accelerator) -> dict[str, Any]:
    """Returns what the run ran on."""
    return {
        "python": platform.python_version(),
        "platform": platform.platform(),
        "versions": versions(),
        "git": git_state(Path(__file__).resolve().parents[1]),
        "device": str(accelerator.device),
        "num_processes": accelerator.num_processes,
    }


def git_state(checkout: Path) -> dict[str, Any] | None:
    """Returns the commit of ``checkout``, and whether files differ from it; None where there is no git."""
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


def write_samples(
    path: Path,
    recipe: Recipe,
    task: Task,
    examples: Sequence[Example],
    judged: Mapping[str, tuple[Scores, list[Prediction]]],
) -> None:
    """Writes a page of the first rows with a picture: the question, and what each of ``judged`` said.

    Args:
        path: the HTML file.
        recipe: of the run.
        task: tells what is right.
        examples: the rows judged.
        judged: who answered -> scores and one answer a row.
    """
    cards = [
        Sample(
            picture=open_image(example.images[0], options=example.image_options),
            question=str(example.meta.get("question", example.id)),
            wanted=example.answers[0],
            answers={who: (said[i].text, task.is_correct(said[i].text, example)) for who, (_, said) in judged.items()},
        )
        for i, example in enumerate(examples[:CARDS])
        if example.images
    ]
    write_page(
        path,
        title=f"{recipe.domain}/{recipe.name}",
        intro="The frozen base and the adapter on the test split.",
        rows=[{"adapter": who, "config": recipe.name, **scores.to_json()} for who, (scores, _) in judged.items()],
        own={"adapter": recipe.name},
        samples={"The first rows": cards},
    )


def write_json(path: Path, value: Any) -> None:
    """Writes plain data for people."""
    path.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")


@contextlib.contextmanager
def telling_of_a_full_disk(folder: Path) -> Iterator[None]:
    """Turns a full disk into one error of ours that says what still stands."""
    try:
        yield
    except OSError as error:
        if error.errno not in (ENOSPC, EDQUOT):
            raise
        raise TrainingError(
            f"{error.strerror}: {error.filename or folder} could not be written. The checkpoints in "
            f"{folder / 'checkpoints'} are as they were: make room and start the run again, and it goes on from there."
        ) from error
