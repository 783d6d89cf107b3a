"""A finished run: it is never overwritten, and can be made longer."""

import json
import os
import signal
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest

from finetune.errors import FolderInUseError, RecipeError, StoppedError, TrainingError
from finetune.recipe import parse_recipe
from finetune.runs import sweep
from finetune.runs.train import train
from finetune.training.loop import Trainer
from finetune.training.plan import Plan, learning_rate_factor

ROOT = Path(__file__).parents[2]
WEIGHTS = "adapter_model.safetensors"
TRAIN = {"epochs": 2.0, "max_steps": None, "batch_size": 6, "eval_steps": 2, "logging_steps": 1}  # 6 steps


@pytest.fixture
def recipe(make_recipe, tiny_fast_vlm):
    def recipe(**changes):
        options = {**TRAIN, **changes.pop("train", {})}
        return make_recipe(tiny_fast_vlm, **{"train": options, "method": {"lora_dropout": 0.2}, **changes})

    return recipe


@pytest.fixture
def nothing_is_loaded(monkeypatch):
    """Return a function after which a base cannot be loaded."""
    return lambda: monkeypatch.setattr("finetune.runs.run.base_of", lambda *args, **options: 1 / 0)


def held(folder):
    """Return every file below a folder with its bytes."""
    return {path.relative_to(folder): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def lines_of(folder):
    return [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]


def test_it_is_not_overwritten_but_named_with_the_way_on(recipe, nothing_is_loaded):
    recipe = partial(recipe, task={"max_new_tokens": None})  # which the data then says
    folder = train(recipe()).folder
    before = held(folder)
    nothing_is_loaded()
    with pytest.raises(TrainingError) as caught:
        train(recipe())
    start = f"{folder} holds a finished run, published as testing/squares@1, its adapter in {folder / 'adapter'}. "
    assert str(caught.value).startswith(f"{start}It has the same recipe, so there is nothing to do. ")
    assert (
        f"train.resume=never runs it again from its beginning, and keeps the present files in {folder}/previous/1"
        in (str(caught.value))
    )
    with pytest.raises(TrainingError) as caught:
        train(recipe(train={"epochs": 3.0}))
    assert str(caught.value).startswith(
        f"{start}Its recipe differs: train.epochs was 2.0 and is now 3.0. train.resume=extend goes on from"
    )
    with pytest.raises(TrainingError, match="train.learning_rate was 0.01 and is now 0.02. train.resume=never"):
        train(recipe(train={"learning_rate": 0.02}))
    earlier_names = json.loads(before[Path("recipe.json")])
    earlier_names["data"]["kind"] = earlier_names["data"].pop("question_type")
    (folder / "recipe.json").write_text(json.dumps(earlier_names))
    with pytest.raises(TrainingError, match="It has the same recipe"):
        train(recipe())
    of_another_release = {**json.loads(before[Path("recipe.json")]), "unknown": 1}
    (folder / "recipe.json").write_text(json.dumps(of_another_release))
    with pytest.raises(TrainingError, match="its recipe.json cannot be read, so the recipe of that run is unknown"):
        train(recipe())
    (folder / "recipe.json").write_bytes(before[Path("recipe.json")])
    assert held(folder) == before


def test_the_command_ends_with_2(recipe, tmp_path, capsys):
    from finetune.cli import main

    train(recipe())
    (tmp_path / "r.yaml").write_text(json.dumps(recipe().model_dump(mode="json")))
    capsys.readouterr()
    assert main(["train", str(tmp_path / "r.yaml")]) == 2
    assert "holds a finished run, published as testing/squares@1" in capsys.readouterr().err


@pytest.mark.parametrize("word", ["never", False])
def test_one_that_starts_again_keeps_the_old_one_whole(recipe, capsys, word):
    folder = train(recipe()).folder
    for number in (1, 2):
        before = {path: data for path, data in held(folder).items() if path.parts[0] != "previous"}
        capsys.readouterr()
        result = train(recipe(train={"learning_rate": 0.01 + number / 100, "resume": word}))
        assert f"kept in {folder}/previous/{number}" in capsys.readouterr().out
        assert held(folder / "previous" / str(number)) == before
        assert result.ref == f"testing/squares@{1 + number}"
        assert [line["step"] for line in lines_of(folder) if "loss" in line] == list(range(1, 7))


def test_an_adapter_without_the_rest_of_its_run_is_kept_too(recipe, capsys):
    folder = train(recipe()).folder
    before = (folder / "adapter" / WEIGHTS).read_bytes()
    (folder / "result.json").unlink()
    for checkpoint in (folder / "checkpoints").iterdir():
        (checkpoint / "checkpoint.json").unlink()
    train(recipe(seed=1))
    assert f"the run that was in {folder} is kept in {folder / 'previous' / '1'}" in capsys.readouterr().out
    assert (folder / "previous" / "1" / "adapter" / WEIGHTS).read_bytes() == before


@pytest.mark.parametrize(("word", "meant"), [(False, "never"), (True, "auto"), ("extend", "extend")])
def test_resume_takes_the_words_of_other_tools(recipe, word, meant):
    assert recipe(train={"resume": word}).train.resume == meant
    with pytest.raises(RecipeError, match="train.resume"):
        recipe(train={"resume": "no"})


def test_it_goes_on_to_a_greater_length(recipe, capsys, monkeypatch):
    """From its last step, in the order of rows that a longer run has, on the longer run's schedule."""
    short = train(recipe())
    folder, before = short.folder, held(short.folder)
    capsys.readouterr()
    seen, micro_batches = [], Plan.micro_batches
    monkeypatch.setattr(Plan, "micro_batches", lambda self, *a: seen.append((a[0], self)) or micro_batches(self, *a))
    longer = recipe(train={"epochs": 4.0, "resume": "extend"})
    result = train(longer)
    output = capsys.readouterr().out
    rates = [line["learning_rate"] for line in lines_of(folder) if "loss" in line]
    expected = [0.01 * learning_rate_factor(step, longer.train, 12) for step in range(6, 12)]
    assert rates[6:] == pytest.approx(expected, abs=1e-6) and len(rates) == 12
    assert "step-00000006, 6 steps done, to step 12\n  the learning rate now follows the schedule of 12 steps" in output
    assert f"{rates[5]:.2e} in step 6, {rates[6]:.2e} in step 7" in output
    assert {step for step, _ in seen} == set(range(6, 12))
    kept = held(folder / "previous" / "1")
    for path in ("adapter", "last", "best", "recipe.json", "result.json", "log.jsonl", "scores-base.json"):
        own = {p: data for p, data in before.items() if p.parts[0] == path}
        assert own and own.items() <= kept.items(), path
    assert (
        result.ref == "testing/squares@2" and json.loads((folder / "recipe.json").read_text())["train"]["epochs"] == 4
    )
    with pytest.raises(TrainingError, match="has taken 12 steps and this recipe ends after 12. Set a larger"):
        train(longer)
    assert result.adapter.exists(), "and nothing was moved"


def test_going_on_twice_is_going_on_once(recipe, monkeypatch):
    """A longer run that is stopped goes on, whether or not it had come to a checkpoint of its own."""
    weights = []
    for name, stops in (("whole", ()), ("stopped", (7, 9))):
        train(recipe(name=name))
        longer = recipe(name=name, train={"epochs": 4.0, "resume": "extend"})
        for stop in stops:
            update = Trainer._update

            def stopped(self, *args, stop=stop, update=update):
                if self.state.step + 1 == stop:
                    os.kill(os.getpid(), signal.SIGTERM)
                return update(self, *args)

            with monkeypatch.context() as patched, pytest.raises(StoppedError):
                patched.setattr(Trainer, "_update", stopped)
                train(longer)
        result = train(longer)
        weights.append({part: (result.folder / part / WEIGHTS).read_bytes() for part in ("best", "last", "adapter")})
        assert [path.name for path in (result.folder / "previous").iterdir()] == ["1"]
    assert weights[0] == weights[1]


def test_a_run_that_ended_early_waits_anew(recipe):
    early = {"early_stopping_patience": 1, "eval_steps": 1, "learning_rate": 1e-9}
    folder = train(recipe(train=early)).folder
    steps = len([line for line in lines_of(folder) if "loss" in line])
    assert steps < 6
    with pytest.raises(TrainingError, match="train.resume=extend goes on"):
        train(recipe(train={**early, "early_stopping_patience": None}))
    train(recipe(train={**early, "early_stopping_patience": None, "resume": "extend"}))
    assert len([line for line in lines_of(folder) if "loss" in line]) == 6


def test_only_its_length_may_change(recipe):
    train(recipe())
    with pytest.raises(TrainingError, match="train.learning_rate was 0.01 and is now 0.02"):
        train(recipe(train={"epochs": 4.0, "learning_rate": 0.02, "resume": "extend"}))
    with pytest.raises(TrainingError, match="needs a checkpoint to go on from, but .* holds none. Leave"):
        train(recipe(name="other", train={"resume": "extend"}))


def test_a_folder_that_another_process_writes_is_refused_before_anything_is_loaded(recipe, tmp_path, nothing_is_loaded):
    folder = recipe().run_folder
    code = (
        "import sys; from pathlib import Path; from finetune.core.folder_lock import locked\n"
        f"with locked(Path({str(folder)!r}), what_else=''): print(flush=True); sys.stdin.read()"
    )
    holder = subprocess.Popen(
        [sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )  # fmt: skip
    holder.stdout.readline()
    before = held(folder)
    nothing_is_loaded()
    with pytest.raises(
        FolderInUseError, match=f"is in use: process {holder.pid} of .* another name or train.output_dir"
    ):
        train(recipe())
    assert held(folder) == before
    holder.communicate("")
    with pytest.raises(ZeroDivisionError):
        train(recipe())


def test_a_folder_that_cannot_be_made_is_one_error(recipe, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(RecipeError, match=r"train.output_dir: .* cannot be written: .*file is not a folder"):
        train(recipe(train={"output_dir": str(tmp_path / "file")}))


def test_a_folder_that_no_system_can_make_is_one_error(recipe, tmp_path):
    (tmp_path / "circle").symlink_to(tmp_path / "circle")
    for name, why in (("x" * 300, "File name too long"), ("circle", "Too many levels of symbolic links")):
        with pytest.raises(RecipeError, match=f"train.output_dir: .* cannot be written: {why}"):
            train(recipe(train={"output_dir": str(tmp_path / name)}))


def test_the_error_names_the_folder_that_cannot_be_written(recipe, monkeypatch):
    """As where another process is faster, or a disk has gone read-only since."""
    monkeypatch.setattr("finetune.runs.train.check_recipe", lambda *args, **options: None)
    with pytest.raises(TrainingError, match="must be writable, but .* is not .*Set another train.output_dir"):
        train(recipe(train={"output_dir": "/proc/nothing"}))


def test_a_sweep_takes_up_a_run_that_ended_while_no_sweep_was_there(recipe, tmp_path, monkeypatch):
    path = tmp_path / "r.yaml"
    raw = recipe().model_dump(mode="json")
    path.write_text(json.dumps(raw))
    (run,) = sweep.plan(path, [])
    train(parse_recipe(run.recipe.model_dump(mode="json"), source="run"))
    monkeypatch.setattr(sweep, "run_child", lambda *args, **options: 1 / 0)
    result = run.result()
    assert sweep.run_sweep(path, []) == 0
    assert run.result() == result and result.test is not None
