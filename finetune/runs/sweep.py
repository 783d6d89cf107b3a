"""A grid of runs: every value of some keys with every value of the others, and the results over the seeds.

Each run is a process of its own, started by the same launcher as a single run, so that none inherits memory, random
state or a crash from the one before. The digest of its recipe identifies a run and is in its name. So a sweep that was
stopped, or gets more values, runs only the unfinished runs. The digest does not cover rows that change under the same
path: delete the sweep's folder after such a change.
"""

import itertools
import json
import math
import os
import statistics
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from finetune.adapters.manifest import canonical_json, sha256_hex
from finetune.core.folder_lock import locked
from finetune.core.json_file import write_json
from finetune.core.old_names import RECIPE, current_key, earlier_names
from finetune.errors import RecipeError
from finetune.launch.child import run_child
from finetune.metrics.names import TEST
from finetune.preflight import check_recipe
from finetune.preflight.finished_runs import changed_since, is_finished
from finetune.preflight.result import RESULT, Result
from finetune.recipe import Recipe, load_recipe, read_value

TABLE_NAME = "sweep.json"  # in the folder of the sweep
MAX_RUNS = 1000
_SPLITS = ("val", TEST)


@dataclass(frozen=True, kw_only=True)
class Run:
    """One run of a grid.

    Attributes:
        settings: the swept keys with this run's values.
        recipe: the recipe of the run, under a name of its own.
        overrides: the overrides that turn the config into this recipe.
        digest: the digest of all settings that could change the result, without name and folder.
    """

    settings: Mapping[str, Any]
    recipe: Recipe
    overrides: tuple[str, ...]
    digest: str

    @cached_property
    def _found(self) -> list[Result]:
        return []

    def result(self) -> Result | None:
        """Return the result of the run; None while it is not finished. A found result is not read again."""
        folder = self.recipe.run_folder
        if not self._found and is_finished(folder) and changed_since(self.recipe) == {}:
            if (result := Result.read(folder)) is not None:
                self._found.append(result)
        return self._found[0] if self._found else None

    def __str__(self) -> str:
        """Return the settings as words of a command line."""
        return " ".join(f"{key}={_json(value)}" for key, value in self.settings.items()) or "the recipe as it is"


def plan(config: str | Path, words: Sequence[str]) -> list[Run]:
    """Return the runs of a grid, the last key changing fastest.

    Args:
        config: the path of a recipe file.
        words: ``key=value`` overrides for all runs and ``key=a,b,c`` for the grid. Each value is YAML; one with a
            comma needs quotes or brackets. A sweep publishes only if a word sets ``adapter.publish``.

    Raises:
        RecipeError: a word, or one of the recipes, is wrong.
    """
    values: dict[str, list[Any]] = {}
    for word in words:
        key, found = _read_word(word)
        if again := next((each for each in values if current_key(each, RECIPE) == current_key(key, RECIPE)), None):
            how = "" if again == key else " under its other name"
            raise RecipeError(
                f"a key must be unique, but {again!r} is given twice, again{how} by {word!r}. "
                f"Put all its values in one word: {again}=a,b,c"
            )
        values[key] = found
    fixed = [f"{key}={_json(found[0])}" for key, found in values.items() if len(found) == 1]
    if "adapter.publish" not in values:
        fixed.append("adapter.publish=null")
    grid = {key: found for key, found in values.items() if len(found) > 1}
    if (number := math.prod(map(len, grid.values()))) > MAX_RUNS:
        raise RecipeError(f"a grid must have at most {MAX_RUNS} runs, got {number}. Give fewer values.")
    runs: dict[str, Run] = {}
    for combination in itertools.product(*grid.values()):
        run = _make_run(config, fixed, dict(zip(grid, combination, strict=True)))
        if run.digest in runs:
            raise RecipeError(
                f"the runs of a grid must differ, but two are the same: {runs[run.digest]}, and {run}. "
                "Give each value once."
            )
        runs[run.digest] = run
    return [*runs.values()]


def run_sweep(config: str | Path, words: Sequence[str]) -> int:
    """Run the unfinished runs of a grid, print the table, and keep it as ``sweep.json``.

    Args:
        config: the path of a recipe file.
        words: the words of the command line, as for ``plan``.

    Returns:
        0; 1 if a run failed, after the others; 128 + n if signal n stopped a run, and so the sweep.

    Raises:
        FinetuneError: a word, one of the recipes, or a file that they name is wrong; no run has started.
        FolderInUseError: another sweep holds the folder; no run has started.
    """
    runs = plan(config, words)
    _check(runs)
    folder = runs[0].recipe.run_folder.parent
    with locked(folder, what_else="Or give the recipe another name or train.output_dir."):
        _refuse_foreign(folder / TABLE_NAME)
        return _run_all(runs, config, folder)


def _refuse_foreign(table: Path) -> None:
    """Raise RecipeError if the file of the sweep's table holds something else."""
    if not os.path.lexists(table):
        return
    try:
        rows = json.loads(table.read_text(encoding="utf-8"))["rows"]
    except (OSError, ValueError, LookupError, TypeError):
        rows = None
    if not isinstance(rows, list):
        raise RecipeError(
            f"the file {table} must hold the table of a sweep, but it holds something else. No run was started. Move "
            "it away, or give the recipe another name or train.output_dir."
        )


def _run_all(runs: Sequence[Run], config: str | Path, folder: Path) -> int:
    failed = []
    for number, run in enumerate(runs, start=1):
        finished = run.result() is not None
        print(
            f"[{number}/{len(runs)}] {run} {'is finished:' if finished else 'in'} {run.recipe.run_folder}", flush=True
        )
        if finished:
            continue
        signals: list[int] = []
        command = [sys.executable, "-P", "-m", "finetune.launch", str(config), *run.overrides]
        code = run_child(command, env=os.environ, passed_on=signals)
        problem = f"exit code {code}" if code else None
        if not code and run.result() is None:
            problem = f"exit code 0, but {run.recipe.run_folder / RESULT} holds no result of this recipe"
        _keep_table(folder, runs)
        if signals:
            print("stopped; run the same command again for the unfinished runs", flush=True)
            return 128 + signals[0]
        if problem:
            failed.append(f"failed: {run} ({problem})")
    rows = _keep_table(folder, runs)
    print("\n".join(["", format_table(rows), *failed, "", f"kept in {folder / TABLE_NAME}"]))
    return 1 if failed else 0


def summarize(runs: Iterable[Run]) -> list[dict[str, Any]]:
    """Return one row for each combination of settings, over its seeds, the best first.

    Scores have their names as keys, such as ``val.METRIC`` and ``test.METRIC``, of the metric that chose the runs' best
    weights. The validation score gives the order, because a choice by the test rows would make their score too good;
    without validation rows the test score does. Spread is the standard deviation of a sample (n - 1), None for a single
    run.
    """
    rows: dict[str, dict[str, Any]] = {}
    results = [(run, run.result()) for run in runs]
    first = next((result for _, result in results if result is not None), None)
    val, test = names = [f"{split}.{first.metric}" for split in _SPLITS] if first else list(_SPLITS)
    for run, result in results:
        settings = {key: value for key, value in run.settings.items() if key != "seed"}
        row = rows.setdefault(_json(settings), {"settings": settings, "runs": []})
        scores = {val: result.val, test: result.test} if result else {val: None, test: None}
        row["runs"].append({"name": run.recipe.name, "seed": run.recipe.seed, "finished": result is not None, **scores})
    for row in rows.values():
        for name in names:
            found = [one[name] for one in row["runs"] if one[name] is not None]
            row[name] = {
                "mean": statistics.fmean(found) if found else None,
                "spread": statistics.stdev(found) if len(found) > 1 else None,
            }
    by = test if all(row[val]["mean"] is None for row in rows.values()) else val
    sign = -1 if first is None or first.higher_is_better else 1
    return sorted(rows.values(), key=lambda row: math.inf if row[by]["mean"] is None else sign * row[by]["mean"])


def format_table(rows: Sequence[Mapping[str, Any]]) -> str:
    """Return the rows of ``summarize`` as a table for people."""
    keys = list(rows[0]["settings"])
    names = [key for key in rows[0] if key not in ("settings", "runs")]
    lines = [[*keys, "runs", *(head for name in names for head in (name, "spread"))]]
    for row in rows:
        total, finished = len(row["runs"]), sum(one["finished"] for one in row["runs"])
        scores = [row[name][what] for name in names for what in ("mean", "spread")]
        lines.append(
            [
                *(_json(row["settings"][key]).strip('"') for key in keys),
                str(total) if finished == total else f"{finished} of {total}",
                *("-" if score is None else f"{score:.3f}" for score in scores),
            ]
        )
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join("  ".join(map(str.ljust, line, widths)).rstrip() for line in lines)


def _check(runs: Sequence[Run]) -> None:
    """Check the runs that are to start, once for each different set of checked settings."""
    different = {}
    for run in runs:
        if run.result() is None:
            parts = run.recipe.model_dump(mode="json", include={"model", "data", "task", "adapter"})
            different[_json(parts)] = run.recipe
    for recipe in different.values():
        check_recipe(recipe, finished=False)


def _read_word(word: str) -> tuple[str, list[Any]]:
    key, equals, text = word.partition("=")
    if not equals or not key:
        raise RecipeError(
            f"each word must be key=value, or key=a,b,c for a grid, got {word!r}; "
            "for example train.learning_rate=1e-3,3e-3"
        )
    if "," not in text:
        return key, [read_value(text, source=f"{word!r}")]
    # The text between the brackets of a YAML list.
    return key, read_value(f"[{text}]", source=f"{word!r} (put a value with a comma in quotes or brackets)")


def _make_run(config: str | Path, fixed: Sequence[str], settings: Mapping[str, Any]) -> Run:
    overrides = [*fixed, *(f"{key}={_json(value)}" for key, value in settings.items())]
    recipe = load_recipe(config, overrides)
    counted = recipe.model_dump(mode="json")
    del counted["name"], counted["train"]["output_dir"]
    digest = sha256_hex(canonical_json(earlier_names(counted, RECIPE)))
    folder = Path(recipe.train.output_dir) / f"{recipe.name}-sweep"
    name = f"{recipe.name[:50].rstrip('-')}-{digest[:10]}"
    overrides += [f"name={_json(name)}", f"train.output_dir={_json(str(folder))}"]
    return Run(settings=settings, recipe=load_recipe(config, overrides), overrides=tuple(overrides), digest=digest)


def _keep_table(folder: Path, runs: Sequence[Run]) -> list[dict[str, Any]]:
    rows = summarize(runs)
    _write(folder / TABLE_NAME, {"rows": rows})
    return rows


def _write(path: Path, value: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    write_json(path, value)


def _json(value: Any) -> str:
    # JSON is YAML too, in one line and without its surprises.
    return json.dumps(value, ensure_ascii=False, default=str)
